using System;
using System.Runtime.InteropServices;

namespace AlignedKV
{
    /// <summary>How errors of tokens add up to the tolerance.</summary>
    public enum Mode
    {
        /// <summary>As if independent: the rms error of a channel stays near tolerance * A.</summary>
        Expected = Native.AKV_EXPECTED,
        /// <summary>Bounds add: Bound itself stays within tolerance * A.</summary>
        Guaranteed = Native.AKV_GUARANTEED,
        /// <summary>All stored digits are read.</summary>
        Exact = Native.AKV_EXACT,
    }

    /// <summary>Which tokens a query row sees.</summary>
    public enum Visibility
    {
        /// <summary>At its own position and before.</summary>
        Causal = Native.AKV_CAUSAL,
        /// <summary>All of its sequence.</summary>
        Full = Native.AKV_FULL,
    }

    /// <summary>What an attention call read and how.</summary>
    public struct Stats
    {
        internal akv_stats Raw;

        /// <summary>Bytes of K read: digits, scale bytes and exact rows.</summary>
        public ulong BytesK { get { return Raw.bytes_k; } }
        /// <summary>The same of V.</summary>
        public ulong BytesV { get { return Raw.bytes_v; } }
        /// <summary>Of both: scale bytes, and what else is stored once for a tile.</summary>
        public ulong BytesScales { get { return Raw.bytes_scales; } }
        /// <summary>Of both: rows kept as given.</summary>
        public ulong BytesExact { get { return Raw.bytes_exact; } }
        /// <summary>Tokens attended, summed over KV heads and query rows.</summary>
        public ulong Tokens { get { return Raw.tokens; } }
        /// <summary>Query rows that took the dense path.</summary>
        public ulong DenseRows { get { return Raw.dense_rows; } }
        /// <summary>What computed.</summary>
        public Backend Backend { get { return (Backend)Raw.backend; } }
        /// <summary>With which instruction set.</summary>
        public Isa Isa { get { return (Isa)Raw.isa; } }
        /// <summary>By which paths.</summary>
        public AttentionPath Path { get { return (AttentionPath)Raw.path; } }

        /// <summary>Tokens, per KV head and query row, of which so many planes of K (0 to 4) were read.</summary>
        public unsafe ulong PlanesK(int planes)
        {
            if (planes < 0 || planes > 4) throw new ArgumentOutOfRangeException("planes");
            fixed (ulong* p = Raw.planes_k) return p[planes];
        }

        /// <summary>The same of V.</summary>
        public unsafe ulong PlanesV(int planes)
        {
            if (planes < 0 || planes > 4) throw new ArgumentOutOfRangeException("planes");
            fixed (ulong* p = Raw.planes_v) return p[planes];
        }
    }

    /// <summary>
    /// An attention call over memory of the caller's. Q [queries][QHeads][DimK] and Out [queries][QHeads][DimV] are needed;
    /// the other spans are empty or as long as they say.
    /// </summary>
    public ref struct AttentionCall
    {
        /// <summary>Queries, after RoPE.</summary>
        public ReadOnlyRows Q;
        /// <summary>Where the outputs go.</summary>
        public Rows Out;
        /// <summary>Factor of the dot products; 0 = 1 / sqrt(DimK).</summary>
        public float Scale;
        /// <summary>Cap of the scores; 0 = none.</summary>
        public float LogitSoftcap;
        /// <summary>Allowed error relative to A = sum of p * max|v|; 0 = 1e-3.</summary>
        public float Tolerance;
        /// <summary>How errors of tokens add up to the tolerance.</summary>
        public Mode Mode;
        /// <summary>Which tokens a query row sees.</summary>
        public Visibility Visibility;
        /// <summary>Sliding window of this call; 0 = the layer's.</summary>
        public int Window;
        /// <summary>First tokens that a window does not hide.</summary>
        public int SinkTokens;
        /// <summary>[QHeads]: factors of distances to tokens, or of what Mask adds.</summary>
        public ReadOnlySpan<float> AlibiSlopes;
        /// <summary>[QHeads]: score of a token more, whose value is 0.</summary>
        public ReadOnlySpan<float> SinkLogits;
        /// <summary>Of SlotsAttention: who sees what.</summary>
        public Mask Mask;
        /// <summary>[queries]: only tokens from here on.</summary>
        public ReadOnlySpan<long> KVFrom;
        /// <summary>[queries]: only tokens below.</summary>
        public ReadOnlySpan<long> KVTo;
        /// <summary>[queries]: bits over the last 64 tokens.</summary>
        public ReadOnlySpan<ulong> Tree;
        /// <summary>[queries][QHeads]: log of the softmax's normaliser.</summary>
        public Span<float> Lse;
        /// <summary>[queries][QHeads]: the certificate. No channel of the output is further off than this.</summary>
        public Span<float> Bound;
        /// <summary>[queries][QHeads]: the same for Lse.</summary>
        public Span<float> LseBound;
        /// <summary>[queries][QHeads]: root mean square error of a channel that is to be expected.</summary>
        public Span<float> Estimate;
        /// <summary>[queries][QHeads]: A, what the tolerance is relative to.</summary>
        public Span<float> Amplitude;

        static void Check(string name, int have, long need)
        {
            if (have != 0 && have < need) throw Library.Short(name, have, need);
        }

        internal unsafe void Run(IntPtr handle, int layer, akv_layer_desc shape, long queries, ReadOnlySpan<Cells> spans, bool slots,
            out Stats stats)
        {
            long rows = queries * shape.n_q_heads;
            Q.Check("Q", queries, shape.n_q_heads, shape.dim_k);
            Out.Read.Check("Out", queries, shape.n_q_heads, shape.dim_v);
            Check("AlibiSlopes", AlibiSlopes.Length, shape.n_q_heads);
            Check("SinkLogits", SinkLogits.Length, shape.n_q_heads);
            Check("KVFrom", KVFrom.Length, queries);
            Check("KVTo", KVTo.Length, queries);
            Check("Tree", Tree.Length, queries);
            Check("Lse", Lse.Length, rows);
            Check("Bound", Bound.Length, rows);
            Check("LseBound", LseBound.Length, rows);
            Check("Estimate", Estimate.Length, rows);
            Check("Amplitude", Amplitude.Length, rows);
            stats = default(Stats);
            fixed (byte* q = &MemoryMarshal.GetReference(Q.Data))
            fixed (byte* output = &MemoryMarshal.GetReference(Out.Read.Data))
            fixed (float* alibi = &MemoryMarshal.GetReference(AlibiSlopes))
            fixed (float* sinks = &MemoryMarshal.GetReference(SinkLogits))
            fixed (long* from = &MemoryMarshal.GetReference(KVFrom))
            fixed (long* to = &MemoryMarshal.GetReference(KVTo))
            fixed (ulong* tree = &MemoryMarshal.GetReference(Tree))
            fixed (float* lse = &MemoryMarshal.GetReference(Lse))
            fixed (float* bound = &MemoryMarshal.GetReference(Bound))
            fixed (float* lseBound = &MemoryMarshal.GetReference(LseBound))
            fixed (float* estimate = &MemoryMarshal.GetReference(Estimate))
            fixed (float* amplitude = &MemoryMarshal.GetReference(Amplitude))
            fixed (Cells* cells = &MemoryMarshal.GetReference(spans))
            fixed (akv_stats* counted = &stats.Raw)
            {
                var d = new akv_attention_desc
                {
                    struct_size = (uint)sizeof(akv_attention_desc), q = Q.At(q), @out = Out.Read.At(output), scale = Scale,
                    logit_softcap = LogitSoftcap, tolerance = Tolerance, mode = (int)Mode, visibility = (int)Visibility,
                    window = Window, sink_tokens = SinkTokens, alibi_slopes = alibi, sink_logits = sinks, kv_from = from, kv_to = to, tree = tree, lse = lse,
                    bound = bound, lse_bound = lseBound, estimate = estimate, amplitude = amplitude, stats = counted,
                };
                int status;
                if (Mask == null)
                {
                    status = slots
                        ? Native.akv_slots_attention((akv_cache*)handle, layer, (akv_span*)cells, spans.Length, &d)
                        : Native.akv_aligned_attention((akv_batch*)handle, layer, &d);
                }
                else
                {
                    using (var mask = Mask.Handle.Hold())
                    {
                        d.mask = (akv_mask*)mask.Value;
                        status = slots
                            ? Native.akv_slots_attention((akv_cache*)handle, layer, (akv_span*)cells, spans.Length, &d)
                            : Native.akv_aligned_attention((akv_batch*)handle, layer, &d);
                    }
                }
                Library.Check(status);
            }
        }
    }

    /// <summary>Who sees which cell, set once per step for all layers and caches of its context.</summary>
    public sealed class Mask : IDisposable
    {
        internal sealed unsafe class MaskHandle : Handle
        {
            public MaskHandle(Handle context) : base(context) { }
            protected override int Destroy(IntPtr handle) { return Native.akv_mask_destroy((akv_mask*)handle); }
        }

        internal readonly MaskHandle Handle;

        /// <summary>A mask of up to so many query rows and cells. Until they are set, rows see nothing.</summary>
        public unsafe Mask(Context context, long maxRows, long maxKV)
        {
            Handle = new MaskHandle(context.Handle);
            try
            {
                akv_mask* mask;
                using (var use = context.Handle.Hold())
                    Library.Check(Native.akv_mask_create((akv_context*)use.Value, maxRows, maxKV, &mask));
                Handle.Set((IntPtr)mask);
            }
            catch
            {
                Handle.Abandon();
                throw;
            }
        }

        /// <summary>Sets rows from values [rows][kv] on: minus infinity hides a cell, others are added to its score.</summary>
        public unsafe void Set(long firstRow, long rows, long kv, ReadOnlySpan<Float16> values)
        {
            if (rows > 0 && kv > 0 && values.Length / rows < kv) throw Library.Short("values", values.Length, rows * kv);
            using (var use = Handle.Hold())
                fixed (Float16* p = &MemoryMarshal.GetReference(values))
                    Library.Check(Native.akv_mask_set((akv_mask*)use.Value, firstRow, rows, kv, p, 0, null));
        }

        /// <summary>Destroys the mask.</summary>
        public void Dispose() { Handle.Dispose(); }
    }
}
