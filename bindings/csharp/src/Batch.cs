using System;
using System.Runtime.InteropServices;

namespace AlignedKV
{
    /// <summary>Limits of the steps of a batch, so that their memory is known beforehand; 0 = none.</summary>
    public struct Bounds
    {
        /// <summary>Most sequences.</summary>
        public int Sequences;
        /// <summary>Most query rows, of all sequences together.</summary>
        public int Queries;
        /// <summary>Most tokens of a sequence after a step.</summary>
        public long KV;
        /// <summary>Most threads of the caller's on one call.</summary>
        public int Threads;
    }

    /// <summary>
    /// Carries one model step at a time through all layers. Begin, Commit, Abort and Dispose exclude other calls; in
    /// between, Attention may run any number of times at once.
    /// </summary>
    public sealed class Batch : IDisposable
    {
        internal sealed unsafe class BatchHandle : Handle
        {
            public BatchHandle(Handle cache) : base(cache) { }

            /// <summary>Those of the step in progress: they stay until it ends.</summary>
            public Sequence[] Sequences = new Sequence[0];

            protected override int Destroy(IntPtr handle)
            {
                int status = Native.akv_batch_destroy((akv_batch*)handle);
                Release();
                return status;
            }

            public void Release()
            {
                var held = Sequences;
                Sequences = new Sequence[0];
                foreach (var sequence in held) sequence.Handle.DangerousRelease();
            }
        }

        readonly BatchHandle handle;
        readonly Cache cache;
        long newTokens, queries;

        /// <summary>Makes a batch.</summary>
        public unsafe Batch(Cache cache, Bounds bounds = default(Bounds))
        {
            this.cache = cache;
            handle = new BatchHandle(cache.Handle);
            try
            {
                var d = new akv_batch_desc
                {
                    struct_size = (uint)sizeof(akv_batch_desc), max_sequences = bounds.Sequences, max_q = bounds.Queries,
                    max_kv = bounds.KV, max_threads = bounds.Threads,
                };
                akv_batch* batch;
                using (var use = cache.Handle.Hold())
                    Library.Check(Native.akv_batch_create((akv_cache*)use.Value, &d, &batch));
                handle.Set((IntPtr)batch);
            }
            catch
            {
                handle.Abandon();
                throw;
            }
        }

        /// <summary>Destroys the batch; a step in progress is aborted.</summary>
        public void Dispose() { handle.Dispose(); }

        /// <summary>
        /// Begins a step: reserves the pages that new tokens need in all layers, or fails as a whole. Until Commit or Abort
        /// nothing fails for capacity.
        /// </summary>
        /// <param name="sequences">Each at most once.</param>
        /// <param name="newTokens">Tokens that are appended to each; none = 0 for all.</param>
        /// <param name="queries">Query rows of each: its last tokens, new or not; none = as newTokens.</param>
        /// <param name="positions">Of the new tokens, sequence by sequence; none = consecutive.</param>
        public unsafe void Begin(Sequence[] sequences, ReadOnlySpan<int> newTokens, ReadOnlySpan<int> queries = default(ReadOnlySpan<int>),
            ReadOnlySpan<long> positions = default(ReadOnlySpan<long>))
        {
            int n = sequences.Length, held = 0;
            if (!newTokens.IsEmpty && newTokens.Length < n) throw Library.Short("newTokens", newTokens.Length, n);
            if (!queries.IsEmpty && queries.Length < n) throw Library.Short("queries", queries.Length, n);
            long sumNew = 0, sumQueries = 0;
            for (int i = 0; i < n; i++)
            {
                if (sequences[i] == null || sequences[i].Cache != cache)
                    throw new ArgumentException("one is null, or of another cache", "sequences");
                if (!newTokens.IsEmpty) sumNew += newTokens[i];
                if (!queries.IsEmpty) sumQueries += queries[i];
            }
            if (!positions.IsEmpty && positions.Length < sumNew) throw Library.Short("positions", positions.Length, sumNew);
            var ids = new ulong[n];
            try
            {
                for (; held < n; held++)
                {
                    bool added = false;
                    sequences[held].Handle.DangerousAddRef(ref added);
                    ids[held] = (ulong)(long)sequences[held].Handle.DangerousGetHandle();
                }
                using (var use = handle.Hold())
                    fixed (ulong* id = ids)
                    fixed (int* newPointer = &MemoryMarshal.GetReference(newTokens))
                    fixed (int* queriesPointer = &MemoryMarshal.GetReference(queries))
                    fixed (long* positionsPointer = &MemoryMarshal.GetReference(positions))
                    {
                        var d = new akv_batch_desc
                        {
                            struct_size = (uint)sizeof(akv_batch_desc), n_sequences = (uint)n, sequences = id, n_new = newPointer,
                            n_q = queriesPointer, positions = positionsPointer,
                        };
                        Library.Check(Native.akv_batch_begin((akv_batch*)use.Value, &d, null));
                    }
            }
            catch
            {
                while (held > 0) sequences[--held].Handle.DangerousRelease();
                throw;
            }
            handle.Sequences = (Sequence[])sequences.Clone();
            this.newTokens = sumNew;
            this.queries = queries.IsEmpty ? sumNew : sumQueries;
        }

        /// <summary>Ends a step: its tokens are part of their sequences. If Append is missing for a layer, the step goes on.</summary>
        public unsafe void Commit()
        {
            using (var use = handle.Hold()) Library.Check(Native.akv_batch_commit((akv_batch*)use.Value));
            handle.Release();
        }

        /// <summary>Ends a step as if it had not begun. Without one it does nothing.</summary>
        public unsafe void Abort()
        {
            using (var use = handle.Hold()) Library.Check(Native.akv_batch_abort((akv_batch*)use.Value));
            handle.Release();
        }

        /// <summary>
        /// Appends the new tokens' rows in one layer, sequence by sequence: K after RoPE, both in the layer's element types.
        /// Once per layer and step.
        /// </summary>
        public unsafe void Append(int layer, ReadOnlyRows key, ReadOnlyRows value)
        {
            cache.CheckKV(layer, newTokens, key, value, false);
            using (var use = handle.Hold())
                fixed (byte* k = &MemoryMarshal.GetReference(key.Data))
                fixed (byte* v = &MemoryMarshal.GetReference(value.Data))
                {
                    akv_rows rk = key.At(k), rv = value.At(v);
                    Library.Check(Native.akv_quantize_kv((akv_batch*)use.Value, layer, &rk, &rv, null));
                }
        }

        /// <summary>Attention of the step's query rows over their sequences' rows in one layer.</summary>
        public void Attention(int layer, in AttentionCall call)
        {
            Stats stats;
            Attention(layer, in call, out stats);
        }

        /// <summary>The same, with what it read and how.</summary>
        public void Attention(int layer, in AttentionCall call, out Stats stats)
        {
            using (var use = handle.Hold())
                call.Run(use.Value, layer, cache.Shape(layer), queries, default(ReadOnlySpan<Cells>), false, out stats);
        }
    }
}
