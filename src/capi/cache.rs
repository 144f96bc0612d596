//! Caches.

use super::batch::Workspaces;
use super::check::{Field, array, descriptor, dtype, not_built, pointer, sized, within, wrong, zero};
use super::handle::{CACHES, CONTEXTS};
use super::types::*;
use super::{context, device, guard};
use crate::Result;
use crate::backend::cuda::Scratches;
use crate::cache::{Cache, Config, NanPolicy, Placement};
use crate::error::{collect, reserve};
use crate::format::{Dtype, Format, MAX_DIM, MAX_GROUP, MAX_LATENT, MAX_LATENT_GROUP, PLANES, Shape, TILE};
use std::fmt::Display;
use std::sync::{Arc, Mutex};

/// What an `akv_cache` stands for.
pub(super) struct Object {
    /// For akv_slots_attention on a device. Goes first: it waits for what has been launched.
    pub scratches: Option<Mutex<Scratches>>,
    pub cache: Arc<Cache>,
    /// The same on the host.
    pub workspaces: Workspaces,
    /// Keeps it alive, and busy.
    pub context: Arc<context::Object>,
}

impl Object {
    /// An index of a layer.
    pub fn layer(&self, layer: i32) -> Result<usize> {
        let n = self.cache.layouts().len();
        usize::try_from(layer)
            .ok()
            .filter(|&l| l < n)
            .ok_or_else(|| wrong("layer", layer, format_args!("0 to {}", n - 1)))
    }
}

/// Head dimensions that kernels exist for.
fn dim(name: impl Display, value: i32, max: usize) -> Result<usize> {
    let dim = usize::try_from(value).ok().filter(|d| (16..=max).contains(d) && d % 8 == 0);
    dim.ok_or_else(|| wrong(name, value, format_args!("a multiple of 8 from 16 to {max}")))
}

fn shape(l: &akv_layer_desc, name: &dyn Display, format: Format) -> Result<Shape> {
    let at = |field| Field(name, ".", field);
    // Bounds that no model comes near, and under which no size overflows.
    let n_kv_heads = within(at("n_kv_heads"), l.n_kv_heads, 1..=4096)? as usize;
    let n_q_heads = usize::try_from(l.n_q_heads).unwrap_or(0);
    let v_is_prefix = within(at("v_is_prefix_of_k"), l.v_is_prefix_of_k, 0..=1)? != 0;
    let (max_dim, max_group) = if v_is_prefix { (MAX_LATENT, MAX_LATENT_GROUP) } else { (MAX_DIM, MAX_GROUP) };
    if n_q_heads == 0 || n_q_heads % n_kv_heads != 0 || n_q_heads / n_kv_heads > max_group {
        let expected = format_args!("1 to {max_group} times n_kv_heads ({n_kv_heads})");
        return Err(wrong(at("n_q_heads"), l.n_q_heads, expected));
    }
    let dim_k = dim(at("dim_k"), l.dim_k, max_dim)?;
    let dim_v = if l.dim_v == 0 { dim_k } else { dim(at("dim_v"), l.dim_v, max_dim)? };
    if v_is_prefix {
        if dim_v > dim_k {
            return Err(wrong(at("dim_v"), l.dim_v, format_args!("at most dim_k ({dim_k}), which V is a part of")));
        }
        if format == Format::Published {
            return Err(wrong(at("v_is_prefix_of_k"), 1, "0 with AKV_FORMAT_PUBLISHED"));
        }
        for (field, value, of_k) in [("dtype_v", l.dtype_v, l.dtype_k), ("planes_v", l.planes_v, l.planes_k)] {
            if value != 0 && value != of_k {
                return Err(wrong(at(field), value, format_args!("0, or K's ({of_k}), which V is a part of")));
            }
        }
    }
    let planes = |field, value| match (value, format) {
        (0, _) => Ok(PLANES),
        (4, _) | (2 | 3, Format::Aligned) => Ok(value as usize),
        (_, Format::Aligned) => Err(wrong(at(field), value, "2, 3, 4, or 0 for 4")),
        _ => Err(wrong(at(field), value, "0 or 4 with this format, which keeps all bits")),
    };
    let dtype = |field, value| match (dtype(at(field), value)?, format) {
        (Dtype::F32 | Dtype::Bf16, Format::Published) => {
            Err(wrong(at(field), value, "AKV_F16 (1) with AKV_FORMAT_PUBLISHED"))
        }
        (dtype, _) => Ok(dtype),
    };
    let of_v = |v: i32, k: i32| if v_is_prefix { k } else { v };
    let shape = Shape {
        n_q_heads,
        n_kv_heads,
        dim_k,
        dim_v,
        dtype_k: dtype("dtype_k", l.dtype_k)?,
        dtype_v: dtype("dtype_v", of_v(l.dtype_v, l.dtype_k))?,
        planes_k: planes("planes_k", l.planes_k)?,
        planes_v: planes("planes_v", of_v(l.planes_v, l.planes_k))?,
        window: within(at("window"), l.window, 0..=i32::MAX)? as usize,
        v_is_prefix,
    };
    if l.group != 0 {
        return Err(not_built(at("group"), l.group, 0));
    }
    Ok(shape)
}

/// Layers that read the rows of others. `all` are as `layers` say.
fn shares(layers: &[akv_layer_desc], all: &[Shape], name: &str) -> Result<Vec<(usize, usize)>> {
    let mut shares = Vec::new();
    reserve(&mut shares, layers.len())?;
    for (i, l) in layers.iter().enumerate() {
        let of = format_args!("{name}->layers[{i}]");
        let at = |field| Field(&of, ".", field);
        let n = within(at("share_with"), l.share_with, 0..=i as i32)?;
        let Some(other) = (n as usize).checked_sub(1) else { continue };
        if layers[other].share_with != 0 {
            return Err(wrong(at("share_with"), n, "1 + index of a layer with rows of its own"));
        }
        let values = |s: &Shape| {
            let kinds = [s.dtype_k as i32, s.dtype_v as i32, s.v_is_prefix as i32];
            let sizes = [s.n_kv_heads, s.dim_k, s.dim_v, s.planes_k, s.planes_v].map(|x| x as i32);
            (sizes, kinds)
        };
        let ((sizes, kinds), (sizes_there, kinds_there)) = (values(&all[i]), values(&all[other]));
        let names = ["n_kv_heads", "dim_k", "dim_v", "planes_k", "planes_v", "dtype_k", "dtype_v", "v_is_prefix_of_k"];
        let ours = sizes.into_iter().chain(kinds).zip(sizes_there.into_iter().chain(kinds_there));
        if let Some((field, (ours, there))) = names.into_iter().zip(ours).find(|(_, (ours, there))| ours != there) {
            return Err(wrong(at(field), ours, format_args!("that of layer {other}, whose rows it shares ({there})")));
        }
        shares.push((i, other));
    }
    Ok(shares)
}

/// Tokens kept as given at an end of a sequence.
fn exact(name: impl Display, value: u32, default: usize) -> Result<usize> {
    match value {
        0 => Ok(default),
        AKV_NONE => Ok(0),
        n if n as usize <= TILE => Ok(n as usize),
        n => Err(wrong(name, n, format_args!("0 to {TILE}, or AKV_NONE"))),
    }
}

fn placement(desc: &akv_cache_desc, name: &dyn Display, format: Format) -> Result<Placement> {
    let at = |field| Field(name, "->", field);
    let code = within(at("placement"), desc.placement, AKV_APPEND..=AKV_ATTACHED)?;
    if code == AKV_APPEND {
        for (field, value) in [("n_streams", u64::from(desc.n_streams)), ("n_slots", desc.n_slots)] {
            if value != 0 {
                return Err(wrong(at(field), value, "0 with AKV_APPEND"));
            }
        }
        return Ok(Placement::Append);
    }
    let expected = match (code, format) {
        (AKV_ATTACHED, Format::Aligned) | (AKV_SLOTS, Format::Aligned | Format::Raw) => None,
        (AKV_ATTACHED, _) => Some("AKV_FORMAT_ALIGNED (0) with AKV_ATTACHED"),
        _ => Some("AKV_FORMAT_ALIGNED (0) or AKV_FORMAT_RAW (2) with AKV_SLOTS"),
    };
    if let Some(expected) = expected {
        return Err(wrong(at("format"), desc.format, expected));
    }
    Ok(Placement::Slots {
        n_streams: within(at("n_streams"), desc.n_streams, 0..=65536)?.max(1) as usize,
        n_slots: within(at("n_slots"), desc.n_slots, 1..=i32::MAX as u64)? as usize,
        attached: code == AKV_ATTACHED,
    })
}

/// Checks what a cache is to be made of: for making one, and for `akv_supports`.
///
/// # Safety
/// `desc.layers` is NULL, misaligned, or points to `desc.n_layers` layers.
pub(super) unsafe fn config(desc: &akv_cache_desc, name: &str) -> Result<Config> {
    let at = |field| Field(&name, "->", field);
    zero(at("flags"), desc.flags)?;
    let format = match desc.format {
        AKV_FORMAT_ALIGNED => Format::Aligned,
        AKV_FORMAT_PUBLISHED => Format::Published,
        AKV_FORMAT_RAW => Format::Raw,
        other => return Err(wrong(at("format"), other, "an AKV_FORMAT_* code (0 to 2)")),
    };
    let placement = placement(desc, &name, format)?;
    let nan = match desc.nan_policy {
        AKV_NAN_ERROR => NanPolicy::Error,
        AKV_NAN_PROPAGATE | AKV_NAN_ZERO if matches!(placement, Placement::Slots { attached: true, .. }) => {
            let expected = "AKV_NAN_ERROR (0) with AKV_ATTACHED, whose rows are read where they are";
            return Err(wrong(at("nan_policy"), desc.nan_policy, expected));
        }
        AKV_NAN_PROPAGATE => NanPolicy::Propagate,
        AKV_NAN_ZERO => NanPolicy::Zero,
        other => return Err(wrong(at("nan_policy"), other, "an AKV_NAN_* code (0 to 2)")),
    };
    let n_layers = within(at("n_layers"), desc.n_layers, 1..=4096)? as usize;
    // SAFETY: the caller's contract.
    let given = unsafe { array(desc.layers, n_layers, at("layers")) }?;
    let layers = given.iter().enumerate();
    let layers = collect(layers.map(|(i, l)| shape(l, &format_args!("{name}->layers[{i}]"), format)))?;
    let shares = shares(given, &layers, name)?;
    if let (Some((i, other)), true) = (shares.first(), placement != Placement::Append) {
        let name = format_args!("{name}->layers[{i}].share_with");
        return Err(not_built(name, other + 1, "0 with AKV_SLOTS and AKV_ATTACHED"));
    }
    if let (Some(i), true) = (layers.iter().position(|l| l.v_is_prefix), placement != Placement::Append) {
        return Err(not_built(
            format_args!("{name}->layers[{i}].v_is_prefix_of_k"),
            1,
            "0 with AKV_SLOTS and AKV_ATTACHED",
        ));
    }
    if let (Some(i), true) = (layers.iter().position(|l| l.window != 0), placement != Placement::Append) {
        let expected = "0 with AKV_SLOTS and AKV_ATTACHED, whose masks say it";
        return Err(wrong(format_args!("{name}->layers[{i}].window"), layers[i].window, expected));
    }
    let exact_head = exact(at("exact_head"), desc.exact_head, 4)?;
    let exact_tail = exact(at("exact_tail"), desc.exact_tail, 64)?;
    // The other formats store every row as given: there is nothing to keep beside it.
    let lossy = usize::from(format == Format::Aligned);
    Ok(Config {
        placement,
        format,
        nan,
        layers,
        shares,
        max_sequences: if desc.max_sequences == 0 { 65536 } else { desc.max_sequences as usize },
        exact_head: exact_head * lossy,
        exact_tail: exact_tail * lossy,
        max_bytes: desc.max_bytes,
    })
}

/// Makes a cache. Memory for rows is taken as sequences grow. `*out` is written on success only.
///
/// Errors: AKV_E_ARGUMENT, AKV_E_UNSUPPORTED, AKV_E_VERSION, AKV_E_HANDLE, AKV_E_MEMORY.
///
/// Threads: calls on different sequences may run at once. A sequence is read by any number of calls at once or written
/// by one; a call that finds it otherwise returns AKV_E_BUSY and changes nothing.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_cache_create(
    context: *mut akv_context,
    desc: *const akv_cache_desc,
    out: *mut *mut akv_cache,
) -> akv_status {
    guard(|| {
        let context = CONTEXTS.get(context, "context")?;
        let out = pointer(out, "out")?;
        // SAFETY: the caller's contract, for the descriptor, its array and `out`.
        unsafe {
            let config = config(&descriptor(desc, "desc")?, "desc")?;
            if context.device.is_some() {
                device::check_config(&config, "desc")?;
            }
            let cache = Cache::with_device(config, context.allocator.clone(), context.device.clone())?;
            let cache = Arc::new(cache);
            let workspaces = Workspaces::new(cache.memory());
            let scratches = match context.device {
                Some(_) => Some(Mutex::new(Scratches::new(cache.memory())?)),
                None => None,
            };
            out.write(CACHES.insert(Object { scratches, cache, workspaces, context })?);
        }
        Ok(())
    })
}

/// Destroys a cache with all its sequences. AKV_E_BUSY while batches made from it live, or calls are in it (nothing
/// happens then).
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_cache_destroy(cache: *mut akv_cache) -> akv_status {
    guard(|| CACHES.remove(cache, "cache", "destroy its batches first, and let calls end").map(drop))
}

/// Reports what the cache holds. `out->struct_size` must be set, and the rest zeroed if it is a later version's.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_cache_usage(cache: *const akv_cache, out: *mut akv_usage) -> akv_status {
    guard(|| {
        let cache = CACHES.get(cache, "cache")?;
        // SAFETY: the caller's contract; of `out` only struct_size is read.
        let out = unsafe { sized(out, "out") }?;
        let u = cache.cache.usage();
        // SAFETY: `sized` made sure of address and size. What a later version has beyond stays zero.
        unsafe {
            let struct_size = (*out).struct_size;
            out.write(akv_usage {
                struct_size,
                n_sequences: u.n_sequences,
                bytes_reserved: u.bytes_reserved,
                bytes_used: u.bytes_used,
                bytes_kept: u.bytes_kept,
                pages_used: u.pages_used,
                pages_free: u.pages_free,
                pages_shared: u.pages_shared,
                tokens: u.tokens,
            });
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    fn layer() -> akv_layer_desc {
        // SAFETY: plain data.
        let zero: akv_layer_desc = unsafe { std::mem::zeroed() };
        akv_layer_desc { n_q_heads: 8, n_kv_heads: 2, dim_k: 64, ..zero }
    }

    fn with(desc: impl Fn(&mut akv_cache_desc), change: impl Fn(&mut akv_layer_desc)) -> Result<Config> {
        let mut layers = [layer(), layer()];
        change(&mut layers[1]);
        // SAFETY: plain data.
        let mut d: akv_cache_desc = unsafe { std::mem::zeroed() };
        (d.n_layers, d.layers) = (2, layers.as_ptr());
        desc(&mut d);
        // SAFETY: two layers.
        unsafe { config(&d, "desc") }
    }

    #[test]
    fn zeros_are_defaults() {
        let c = with(|_| (), |_| ()).unwrap();
        assert_eq!((c.format, c.max_sequences, c.exact_head, c.exact_tail), (Format::Aligned, 65536, 4, 64));
        let s = c.layers[1];
        assert_eq!((s.dim_v, s.planes_k, s.planes_v, s.dtype_k), (64, 4, 4, Dtype::F32));
        let none = with(|d| (d.exact_head, d.exact_tail) = (AKV_NONE, 128), |_| ()).unwrap();
        assert_eq!((none.exact_head, none.exact_tail), (0, 128));
        let raw = with(|d| (d.format, d.exact_head) = (AKV_FORMAT_RAW, 7), |_| ()).unwrap();
        assert_eq!((raw.exact_head, raw.exact_tail), (0, 0));
    }

    #[test]
    fn every_field_is_checked_and_named() {
        let argument = |result: Result<Config>, name: &str| match result {
            Err(Error::Argument(text)) if text.starts_with(name) => {}
            other => panic!("{other:?} for {name}"),
        };
        type Case = (&'static str, fn(&mut akv_cache_desc));
        let cases: [Case; 12] = [
            ("desc->flags", |d| d.flags = 1),
            ("desc->n_streams", |d| d.n_streams = 1),
            ("desc->format", |d| d.format = 3),
            ("desc->placement", |d| d.placement = -1),
            ("desc->nan_policy", |d| d.nan_policy = 3),
            ("desc->n_slots", |d| d.n_slots = 1),
            ("desc->n_layers", |d| d.n_layers = 0),
            ("desc->n_layers", |d| d.n_layers = 4097),
            ("desc->n_layers", |d| d.n_layers = -1),
            ("desc->layers", |d| d.layers = std::ptr::null()),
            ("desc->exact_head", |d| d.exact_head = 129),
            ("desc->exact_tail", |d| d.exact_tail = AKV_NONE - 1),
        ];
        for (name, change) in cases {
            argument(with(change, |_| ()), name);
        }
        type LayerCase = (&'static str, fn(&mut akv_layer_desc));
        let cases: [LayerCase; 24] = [
            ("n_kv_heads", |l| l.n_kv_heads = 0),
            ("n_kv_heads", |l| l.n_kv_heads = -2),
            ("n_q_heads", |l| l.n_q_heads = 0),
            ("n_q_heads", |l| l.n_q_heads = 7),
            ("n_q_heads", |l| l.n_q_heads = -8),
            ("n_q_heads", |l| l.n_q_heads = 130),
            ("dim_k", |l| l.dim_k = 0),
            ("dim_k", |l| l.dim_k = 8),
            ("dim_k", |l| l.dim_k = 68),
            ("dim_k", |l| l.dim_k = 264),
            ("dim_v", |l| l.dim_v = -64),
            ("dtype_k", |l| l.dtype_k = 3),
            ("dtype_v", |l| l.dtype_v = -1),
            ("planes_k", |l| l.planes_k = 1),
            ("planes_v", |l| l.planes_v = 5),
            ("planes_v", |l| l.planes_v = -4),
            ("window", |l| l.window = -1),
            ("v_is_prefix_of_k", |l| l.v_is_prefix_of_k = 2),
            ("share_with", |l| l.share_with = -1),
            ("share_with", |l| l.share_with = 2),
            ("n_kv_heads", |l| (l.share_with, l.n_kv_heads) = (1, 4)),
            ("dim_v", |l| (l.share_with, l.dim_v) = (1, 32)),
            ("dtype_k", |l| (l.share_with, l.dtype_k) = (1, AKV_F16)),
            ("planes_v", |l| (l.share_with, l.planes_v) = (1, 2)),
        ];
        for (name, change) in cases {
            argument(with(|_| (), change), &format!("desc->layers[1].{name} is "));
        }
        let slots = |d: &mut akv_cache_desc| (d.placement, d.n_slots) = (AKV_SLOTS, 8);
        argument(with(slots, |l| l.window = 9), "desc->layers[1].window");
        argument(with(|d| d.format = AKV_FORMAT_PUBLISHED, |_| ()), "desc->layers[0].dtype_k");
        argument(with(|d| d.format = AKV_FORMAT_RAW, |l| l.planes_k = 2), "desc->layers[1].planes_k");
    }

    #[test]
    fn what_is_not_built_says_so() {
        let unsupported = |result: Result<Config>| assert!(matches!(result, Err(Error::Unsupported(_))), "{result:?}");
        unsupported(with(|_| (), |l| l.group = 1));
        unsupported(with(|d| (d.placement, d.n_slots) = (AKV_SLOTS, 8), |l| l.share_with = 1));
        let slots = |d: &mut akv_cache_desc| (d.placement, d.n_slots) = (AKV_SLOTS, 8);
        unsupported(with(slots, |l| l.v_is_prefix_of_k = 1));
    }
}
