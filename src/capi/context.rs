//! Contexts.

use super::attention::Options;
use super::check::{descriptor, pointer, within, wrong};
use super::guard;
use super::handle::CONTEXTS;
use super::types::*;
use crate::backend::cpu::{Cpu, Isa};
use crate::backend::cuda::{Device, Stream};
use crate::cache::Allocator;
use crate::cache::Placement;
use crate::{Error, Result};
use std::ffi::{CString, c_void};
use std::sync::Arc;

/// What an `akv_context` stands for.
pub(super) struct Object {
    pub cpu: Cpu,
    /// What computes, if it is not the CPU.
    pub device: Option<Arc<Device>>,
    pub allocator: Allocator,
}

impl Object {
    /// The stream of a call; on the CPU there is none.
    ///
    /// # Safety
    /// `stream` is NULL or, on CUDA, a stream.
    pub unsafe fn stream(&self, name: &str, stream: *mut c_void) -> Result<Stream> {
        match &self.device {
            // SAFETY: the caller's contract.
            Some(device) => unsafe { device.stream(stream, name) },
            None if stream.is_null() => Ok(Stream::DEFAULT),
            None => Err(wrong(name, "not NULL", "NULL on the CPU backend")),
        }
    }
}

pub(super) fn isa_code(isa: Isa) -> i32 {
    match isa {
        Isa::Scalar => AKV_ISA_SCALAR,
        Isa::Avx2 => AKV_ISA_AVX2,
        Isa::Avx512 => AKV_ISA_AVX512,
    }
}

/// The code that an environment variable asks for; None if it is unset or empty.
fn forced(variable: &str, value: Option<String>, names: &[(&str, i32)]) -> Result<Option<i32>> {
    let Some(value) = value.filter(|v| !v.is_empty()) else { return Ok(None) };
    match names.iter().find(|(name, _)| *name == value) {
        Some(&(_, code)) => Ok(Some(code)),
        None => {
            let names: Vec<_> = names.iter().map(|(name, _)| *name).collect();
            Err(wrong(format_args!("environment variable {variable}"), format_args!("{value:?}"), names.join(" or ")))
        }
    }
}

fn environment(variable: &str) -> Option<String> {
    std::env::var_os(variable).map(|v| v.to_string_lossy().into_owned())
}

/// Backend and instruction set of a description; an override is told apart in the text.
fn choose(desc: &akv_context_desc, backend: Option<String>, isa: Option<String>) -> Result<(i32, Isa)> {
    let backend = match forced("AKV_BACKEND", backend, &[("cpu", AKV_CPU), ("cuda", AKV_CUDA)])?.unwrap_or(desc.backend)
    {
        0 => AKV_CPU,
        backend @ (AKV_CPU | AKV_CUDA) => backend,
        other => return Err(wrong("desc->backend", other, "0, AKV_CPU (1) or AKV_CUDA (2)")),
    };
    choose_isa(desc, isa).map(|isa| (backend, isa))
}

fn choose_isa(desc: &akv_context_desc, isa: Option<String>) -> Result<Isa> {
    let names = Isa::ALL.map(|isa| (isa.name(), isa_code(isa)));
    let code = forced("AKV_ISA", isa, &names)?.unwrap_or(desc.isa);
    if code == 0 {
        return Ok(Isa::best());
    }
    let isa = Isa::ALL.into_iter().find(|&isa| isa_code(isa) == code);
    let isa = isa.ok_or_else(|| wrong("desc->isa", code, "0 or an AKV_ISA_* code (1 to 3)"))?;
    if !isa.available() {
        let best = Isa::best().name();
        return Err(Error::Unsupported(format!("isa {} is not available: this machine's best is {best}", isa.name())));
    }
    Ok(isa)
}

/// # Safety
/// The functions in `desc` must be as documented, for as long as the context lives.
unsafe fn create(desc: &akv_context_desc) -> Result<Object> {
    if desc.abi_version != AKV_ABI_VERSION {
        return Err(Error::Version(format!(
            "desc->abi_version is {}: this library speaks {AKV_ABI_VERSION} ({})",
            desc.abi_version,
            super::status::VERSION.to_string_lossy()
        )));
    }
    let (backend, isa) = choose(desc, environment("AKV_BACKEND"), environment("AKV_ISA"))?;
    within("desc->device", desc.device, 0..=i32::MAX)?;
    let n_threads = within("desc->n_threads", desc.n_threads, 0..=1024)?.max(1) as usize;
    let allocator = match (desc.alloc, desc.dealloc) {
        (None, None) => Allocator::default(),
        // SAFETY: the caller's contract.
        (Some(alloc), Some(dealloc)) => unsafe { Allocator::hooks(alloc, dealloc, desc.alloc_user) },
        (None, Some(_)) => return Err(wrong("desc->alloc", "NULL but desc->dealloc is not", "both or neither")),
        (Some(_), None) => return Err(wrong("desc->dealloc", "NULL but desc->alloc is not", "both or neither")),
    };
    let device = match backend {
        // SAFETY: the caller's contract.
        AKV_CUDA => Some(Arc::new(unsafe { Device::new(desc.device, desc.cuda_context) }?)),
        _ => None,
    };
    let cpu = Cpu::new(isa, if device.is_some() { 1 } else { n_threads })?;
    if let Some(log) = desc.log {
        let version = super::status::VERSION.to_string_lossy();
        let line = match &device {
            Some(device) => format!("{version}; backend cuda, {}", device.describe()),
            None => format!("{version}; backend cpu, isa {}, threads {}", cpu.isa().name(), cpu.n_threads()),
        };
        let line = CString::new(line).unwrap_or_default();
        // SAFETY: the caller's function, and a string that outlives the call.
        unsafe { log(desc.log_user, AKV_LOG_INFO, line.as_ptr()) };
    }
    Ok(Object { cpu, device, allocator })
}

/// Makes a context. `*out` is written on success only.
///
/// Errors: AKV_E_VERSION (abi_version, unknown tail), AKV_E_ARGUMENT, AKV_E_UNSUPPORTED (backend or ISA that this
/// machine or build lacks), AKV_E_MEMORY.
///
/// Threads: a context may be used from any number of threads at once.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_context_create(desc: *const akv_context_desc, out: *mut *mut akv_context) -> akv_status {
    guard(|| {
        let out = pointer(out, "out")?;
        // SAFETY: the caller's contract, for the descriptor, its functions and `out`.
        unsafe {
            let desc = descriptor(desc, "desc")?;
            out.write(CONTEXTS.insert(create(&desc)?)?);
        }
        Ok(())
    })
}

/// Destroys a context and joins its threads. AKV_E_BUSY while caches made from it live (nothing happens then). NULL is
/// AKV_E_HANDLE.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_context_destroy(context: *mut akv_context) -> akv_status {
    guard(|| CONTEXTS.remove(context, "context", "destroy its caches first, and let calls end").map(drop))
}

/// Returns and clears the first fault of work that was launched on a device (NaN in K, say): AKV_OK if there is none so
/// far, otherwise the fault's status and text, with the place in `*sequence`, `*layer`, `*row` (each NULL allowed; `*row`
/// is a token of the sequence, or the call's query row if q or the outputs are at fault). It waits for nothing: whoever
/// wants to know of all work synchronises the stream before. On the CPU every fault is returned by the call itself, so
/// this is always AKV_OK.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_poll(
    context: *mut akv_context,
    sequence: *mut akv_sequence,
    layer: *mut i32,
    row: *mut u64,
) -> akv_status {
    guard(|| {
        let context = CONTEXTS.get(context, "context")?;
        let Some(device) = &context.device else { return Ok(()) };
        if let Some(error) = device.take_failure() {
            return Err(error);
        }
        let Some(fault) = device.take_fault() else { return Ok(()) };
        // SAFETY: checked, and the caller's contract.
        unsafe {
            if !sequence.is_null() {
                pointer(sequence, "sequence")?.write(fault.sequence);
            }
            if !layer.is_null() {
                pointer(layer, "layer")?.write(fault.layer);
            }
            if !row.is_null() {
                pointer(row, "row")?.write(fault.row as u64);
            }
        }
        Err(super::device::fault(&fault))
    })
}

/// Asks whether caches of `cache` can be created here and attended as `attention` says (NULL: with defaults), without
/// making one: AKV_OK, or what the real call would return, with its text. `*path` (NULL allowed) gets the sum of
/// AKV_PATH_* that such calls can take. Pointers inside `attention` are only tested for NULL.
///
/// # Safety
/// Pointers must be NULL or valid as described.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn akv_supports(
    context: *const akv_context,
    cache: *const akv_cache_desc,
    attention: *const akv_attention_desc,
    path: *mut i32,
) -> akv_status {
    guard(|| {
        let context = CONTEXTS.get(context, "context")?;
        // SAFETY: the caller's contract.
        let config = unsafe { super::cache::config(&descriptor(cache, "cache")?, "cache") }?;
        if context.device.is_some() {
            super::device::check_config(&config, "cache")?;
        }
        let attention = match attention.is_null() {
            // SAFETY: plain data, all zeros is what "defaults" means.
            true => unsafe { std::mem::zeroed() },
            // SAFETY: the caller's contract.
            false => unsafe { descriptor(attention, "attention") }?,
        };
        // SAFETY: the caller's contract.
        unsafe { context.stream("attention->stream", attention.stream) }?;
        let slots = config.placement != Placement::Append;
        let mut paths = 0;
        for shape in &config.layers {
            paths |= Options::new(&attention, "attention", config.format, shape, slots)?.paths;
            if context.device.is_some() {
                super::device::check_attention(&attention, "attention")?;
            }
        }
        if !path.is_null() {
            // SAFETY: checked, and the caller's contract.
            unsafe { pointer(path, "path")?.write(paths) };
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_overrides_and_is_checked() {
        let names = [("cpu", 1), ("cuda", 2)];
        let value = |v: &str| Some(v.to_owned());
        assert_eq!(forced("AKV_BACKEND", None, &names), Ok(None));
        assert_eq!(forced("AKV_BACKEND", value(""), &names), Ok(None));
        assert_eq!(forced("AKV_BACKEND", value("cuda"), &names), Ok(Some(2)));
        let text = "environment variable AKV_BACKEND is \"gpu\": expected cpu or cuda".to_owned();
        assert_eq!(forced("AKV_BACKEND", value("gpu"), &names), Err(Error::Argument(text)));
    }
}
