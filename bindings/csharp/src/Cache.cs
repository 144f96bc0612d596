using System;
using System.IO;
using System.Runtime.InteropServices;

namespace AlignedKV
{
    /// <summary>How rows are stored.</summary>
    public enum Format
    {
        /// <summary>Precision-aligned digit planes under shared scales.</summary>
        Aligned = Native.AKV_FORMAT_ALIGNED,
        /// <summary>AlignedKV as published: f16 cut into 8 | 4 | 4 bits.</summary>
        Published = Native.AKV_FORMAT_PUBLISHED,
        /// <summary>Rows as given.</summary>
        Raw = Native.AKV_FORMAT_RAW,
    }

    /// <summary>Who says where rows lie.</summary>
    public enum Placement
    {
        /// <summary>The library appends rows to sequences.</summary>
        Append = Native.AKV_APPEND,
        /// <summary>The engine writes rows to cells.</summary>
        Slots = Native.AKV_SLOTS,
        /// <summary>The engine keeps its rows; the library has an index beside them.</summary>
        Attached = Native.AKV_ATTACHED,
    }

    /// <summary>What happens with NaN and infinity in K, V or q.</summary>
    public enum NanPolicy
    {
        /// <summary>The call fails.</summary>
        Error = Native.AKV_NAN_ERROR,
        /// <summary>It spreads to what it touches.</summary>
        Propagate = Native.AKV_NAN_PROPAGATE,
        /// <summary>It is stored as 0.</summary>
        Zero = Native.AKV_NAN_ZERO,
    }

    /// <summary>Shape of one layer's attention.</summary>
    public sealed class Layer
    {
        /// <summary>Query heads, a multiple of KVHeads: head h reads KV head h / (QHeads / KVHeads).</summary>
        public int QHeads { get; set; }
        /// <summary>KV heads.</summary>
        public int KVHeads { get; set; }
        /// <summary>Channels of q and K: a multiple of 8 from 16 to 256 (576 if VIsPrefixOfK).</summary>
        public int DimK { get; set; }
        /// <summary>Channels of V and of the output; 0 = DimK.</summary>
        public int DimV { get; set; }
        /// <summary>Element type of the K rows.</summary>
        public DType DTypeK { get; set; }
        /// <summary>Element type of the V rows.</summary>
        public DType DTypeV { get; set; }
        /// <summary>Digit planes of K that are stored: 2, 3 or 4; 0 = 4.</summary>
        public int PlanesK { get; set; }
        /// <summary>The same of V.</summary>
        public int PlanesV { get; set; }
        /// <summary>Sliding window in positions; 0 = none.</summary>
        public int Window { get; set; }
        /// <summary>0.</summary>
        public int Group { get; set; }
        /// <summary>1 + index of an earlier layer of the same kind whose rows this one reads (it gets no Append); 0 = its
        /// own.</summary>
        public int ShareWith { get; set; }
        /// <summary>V is the first DimV channels of K (MLA), and Append gets no V.</summary>
        public bool VIsPrefixOfK { get; set; }
    }

    /// <summary>What a cache is made of.</summary>
    public sealed class CacheOptions
    {
        /// <summary>For ExactHead and ExactTail: none at all.</summary>
        public const uint None = Native.AKV_NONE;

        /// <summary>Options of a cache with these layers.</summary>
        public CacheOptions(params Layer[] layers) { Layers = layers; }

        /// <summary>The layers.</summary>
        public Layer[] Layers { get; set; }
        /// <summary>How rows are stored.</summary>
        public Format Format { get; set; }
        /// <summary>Who says where rows lie.</summary>
        public Placement Placement { get; set; }
        /// <summary>What happens with NaN and infinity.</summary>
        public NanPolicy NanPolicy { get; set; }
        /// <summary>Most sequences alive at once; 0 = 65536.</summary>
        public uint MaxSequences { get; set; }
        /// <summary>First tokens whose rows are kept as given; 0 = 4.</summary>
        public uint ExactHead { get; set; }
        /// <summary>Tokens that can be truncated as if never appended; 0 = 64.</summary>
        public uint ExactTail { get; set; }
        /// <summary>Streams of Slots and Attached; 0 = 1.</summary>
        public uint Streams { get; set; }
        /// <summary>Cells of a stream.</summary>
        public ulong Slots { get; set; }
        /// <summary>Most bytes that the cache may take; 0 = no limit.</summary>
        public ulong MaxBytes { get; set; }

        internal akv_layer_desc[] RawLayers()
        {
            var raw = new akv_layer_desc[Layers.Length];
            for (int i = 0; i < raw.Length; i++)
            {
                var l = Layers[i];
                raw[i] = new akv_layer_desc
                {
                    n_q_heads = l.QHeads, n_kv_heads = l.KVHeads, dim_k = l.DimK, dim_v = l.DimV, dtype_k = (int)l.DTypeK,
                    dtype_v = (int)l.DTypeV, planes_k = l.PlanesK, planes_v = l.PlanesV, window = l.Window, group = l.Group,
                    share_with = l.ShareWith, v_is_prefix_of_k = l.VIsPrefixOfK ? 1 : 0,
                };
            }
            return raw;
        }

        internal unsafe akv_cache_desc Raw(akv_layer_desc* layers)
        {
            return new akv_cache_desc
            {
                struct_size = (uint)sizeof(akv_cache_desc), format = (int)Format, placement = (int)Placement,
                nan_policy = (int)NanPolicy, n_layers = Layers.Length, layers = layers, max_sequences = MaxSequences,
                exact_head = ExactHead, exact_tail = ExactTail, n_streams = Streams, n_slots = Slots, max_bytes = MaxBytes,
            };
        }
    }

    /// <summary>What a cache holds at the moment.</summary>
    public struct Usage
    {
        internal akv_usage Raw;

        /// <summary>Sequences alive.</summary>
        public long Sequences { get { return Raw.n_sequences; } }
        /// <summary>Bytes taken: what MaxBytes limits.</summary>
        public ulong BytesReserved { get { return Raw.bytes_reserved; } }
        /// <summary>Of these: in use by sequences and batches.</summary>
        public ulong BytesUsed { get { return Raw.bytes_used; } }
        /// <summary>Of these: rows kept as given.</summary>
        public ulong BytesKept { get { return Raw.bytes_kept; } }
        /// <summary>Pages in use; a page is 128 tokens of one layer.</summary>
        public ulong PagesUsed { get { return Raw.pages_used; } }
        /// <summary>Pages waiting for reuse.</summary>
        public ulong PagesFree { get { return Raw.pages_free; } }
        /// <summary>Pages that more than one sequence holds.</summary>
        public ulong PagesShared { get { return Raw.pages_shared; } }
        /// <summary>Tokens of all sequences, shared ones counted for each; cells with rows in a layer.</summary>
        public ulong Tokens { get { return Raw.tokens; } }
    }

    /// <summary>The cells that some query rows look at.</summary>
    [StructLayout(LayoutKind.Sequential)]
    public struct Cells
    {
        /// <summary>Stream.</summary>
        public int Stream;
        /// <summary>Query rows.</summary>
        public int Queries;
        /// <summary>They look at cells 0 to KV - 1 of the stream.</summary>
        public long KV;
    }

    /// <summary>
    /// The KV rows of all sequences and layers. Calls on different sequences may run at once; what excludes each other
    /// throws Status.Busy and has done nothing.
    /// </summary>
    public sealed class Cache : IDisposable
    {
        internal sealed unsafe class CacheHandle : Handle
        {
            public CacheHandle(Handle context) : base(context) { }

            /// <summary>Rows that the library reads where the engine keeps them, two by layer.</summary>
            public GCHandle[] Attached = new GCHandle[0];

            protected override int Destroy(IntPtr handle)
            {
                int status = Native.akv_cache_destroy((akv_cache*)handle);
                foreach (var pin in Attached)
                    if (pin.IsAllocated) pin.Free();
                return status;
            }
        }

        internal readonly CacheHandle Handle;
        readonly akv_layer_desc[] layers;
        readonly long slots;

        /// <summary>Makes a cache. Memory for rows is taken as sequences grow.</summary>
        public unsafe Cache(Context context, CacheOptions options)
        {
            layers = options.RawLayers();
            slots = (long)options.Slots * Math.Max(1, (long)options.Streams);
            Handle = new CacheHandle(context.Handle);
            try
            {
                using (var use = context.Handle.Hold())
                    fixed (akv_layer_desc* p = layers)
                    {
                        var d = options.Raw(p);
                        akv_cache* cache;
                        Library.Check(Native.akv_cache_create((akv_context*)use.Value, &d, &cache));
                        Handle.Set((IntPtr)cache);
                    }
            }
            catch
            {
                Handle.Abandon();
                throw;
            }
            Handle.Attached = new GCHandle[2 * layers.Length];
        }

        /// <summary>Destroys the cache, or leaves it to the sequences and batches that were made from it.</summary>
        public void Dispose() { Handle.Dispose(); }

        /// <summary>What the cache holds.</summary>
        public unsafe Usage Usage
        {
            get
            {
                using (var use = Handle.Hold())
                {
                    var u = new akv_usage { struct_size = (uint)sizeof(akv_usage) };
                    Library.Check(Native.akv_cache_usage((akv_cache*)use.Value, &u));
                    return new Usage { Raw = u };
                }
            }
        }

        /// <summary>Shape of a layer; of one that is none, nothing is known, and the library says so.</summary>
        internal akv_layer_desc Shape(int layer)
        {
            var shape = layer >= 0 && layer < layers.Length ? layers[layer] : default(akv_layer_desc);
            if (shape.dim_v == 0) shape.dim_v = shape.dim_k;
            return shape;
        }

        internal int LayerCount { get { return layers.Length; } }

        internal void CheckKV(int layer, long n, ReadOnlyRows key, ReadOnlyRows value, bool optional)
        {
            var shape = Shape(layer);
            if (!optional || !key.Data.IsEmpty) key.Check("key", n, shape.n_kv_heads, shape.dim_k);
            if (!optional || !value.Data.IsEmpty) value.Check("value", n, shape.n_kv_heads, shape.dim_v);
        }

        /// <summary>
        /// Writes rows to cells: cell c of stream s is slot s * Slots + c. No rows leave K or V out; without both, the attached
        /// rows of these slots have changed.
        /// </summary>
        public unsafe void WriteSlots(int layer, ReadOnlySpan<long> slots, ReadOnlyRows key, ReadOnlyRows value)
        {
            CheckKV(layer, slots.Length, key, value, true);
            using (var use = Handle.Hold())
                fixed (long* s = &MemoryMarshal.GetReference(slots))
                fixed (byte* k = &MemoryMarshal.GetReference(key.Data))
                fixed (byte* v = &MemoryMarshal.GetReference(value.Data))
                {
                    akv_rows rk = key.At(k), rv = value.At(v);
                    Library.Check(Native.akv_slots_write((akv_cache*)use.Value, layer, s, slots.Length, key.Data.IsEmpty ? null : &rk,
                        value.Data.IsEmpty ? null : &rv, null));
                }
        }

        /// <summary>Reads n slots from first on back, in any element type. No rows leave K or V out.</summary>
        public unsafe void ReadSlots(int layer, long first, long n, Rows key, Rows value)
        {
            CheckKV(layer, n, key, value, true);
            using (var use = Handle.Hold())
                fixed (byte* k = &MemoryMarshal.GetReference(key.Read.Data))
                fixed (byte* v = &MemoryMarshal.GetReference(value.Read.Data))
                {
                    akv_rows rk = key.Read.At(k), rv = value.Read.At(v);
                    Library.Check(Native.akv_slots_read((akv_cache*)use.Value, layer, first, n, k == null ? null : &rk,
                        v == null ? null : &rv, null));
                }
        }

        /// <summary>Forgets n slots from first on, in a layer or (-1) in all.</summary>
        public unsafe void InvalidateSlots(int layer, long first, long n)
        {
            using (var use = Handle.Hold()) Library.Check(Native.akv_slots_invalidate((akv_cache*)use.Value, layer, first, n));
        }

        /// <summary>Copies n slots, in a layer or (-1) in all.</summary>
        public unsafe void CopySlots(int layer, long from, long to, long n)
        {
            using (var use = Handle.Hold()) Library.Check(Native.akv_slots_copy((akv_cache*)use.Value, layer, from, to, n));
        }

        /// <summary>
        /// Names the engine's own rows of a layer, of all cells of all streams, contiguous, in arrays of float, Float16 or
        /// BFloat16. They are pinned until others are named or the cache is destroyed.
        /// </summary>
        public unsafe void Attach(int layer, Array key, Array value)
        {
            var shape = Shape(layer);
            Whole("key", key, slots * shape.n_kv_heads * shape.dim_k);
            Whole("value", value, slots * shape.n_kv_heads * shape.dim_v);
            GCHandle k = GCHandle.Alloc(key, GCHandleType.Pinned), v = GCHandle.Alloc(value, GCHandleType.Pinned);
            try
            {
                akv_rows rk = new akv_rows { data = (void*)k.AddrOfPinnedObject(), dtype = TypeOf(key) };
                akv_rows rv = new akv_rows { data = (void*)v.AddrOfPinnedObject(), dtype = TypeOf(value) };
                using (var use = Handle.Hold())
                    lock (Handle)
                    {
                        Library.Check(Native.akv_attach_rows((akv_cache*)use.Value, layer, &rk, &rv));
                        Swap(ref Handle.Attached[2 * layer], ref k);
                        Swap(ref Handle.Attached[2 * layer + 1], ref v);
                    }
            }
            finally // Of what is not in use, or not any more.
            {
                if (k.IsAllocated) k.Free();
                if (v.IsAllocated) v.Free();
            }
        }

        static void Swap(ref GCHandle a, ref GCHandle b)
        {
            var old = a;
            a = b;
            b = old;
        }

        static void Whole(string name, Array array, long need)
        {
            if (array.LongLength < need) throw Library.Short(name, array.LongLength, need);
        }

        static int TypeOf(Array array)
        {
            if (array is float[]) return Native.AKV_F32;
            if (array is Float16[]) return Native.AKV_F16;
            if (array is BFloat16[]) return Native.AKV_BF16;
            throw new ArgumentException("is " + array.GetType() + ", expected float[], Float16[] or BFloat16[]");
        }

        /// <summary>Attention of query rows over cells: rows lie span by span, and see what the mask lets them see.</summary>
        public unsafe void SlotsAttention(int layer, ReadOnlySpan<Cells> spans, in AttentionCall call)
        {
            Stats stats;
            SlotsAttention(layer, spans, in call, out stats);
        }

        /// <summary>The same, with what it read and how.</summary>
        public unsafe void SlotsAttention(int layer, ReadOnlySpan<Cells> spans, in AttentionCall call, out Stats stats)
        {
            long queries = 0;
            foreach (var span in spans) queries += Math.Max(0, span.Queries);
            using (var use = Handle.Hold()) call.Run(use.Value, layer, Shape(layer), queries, spans, true, out stats);
        }

        /// <summary>
        /// Makes a sequence from an exported stream, of which no byte beyond its end is read. If that throws, there is none.
        /// </summary>
        public Sequence Import(Stream stream)
        {
            return new Sequence(this, Import(stream, 0));
        }

        internal unsafe ulong Import(Stream stream, ulong into)
        {
            Exception failure = null;
            Native.akv_sequence_import_read_delegate read = delegate(void* user, void* bytes, UIntPtr n)
            {
                try
                {
                    var buffer = new byte[(int)n];
                    for (int at = 0, got; at < buffer.Length; at += got)
                        if ((got = stream.Read(buffer, at, buffer.Length - at)) == 0) throw new EndOfStreamException();
                    Marshal.Copy(buffer, 0, (IntPtr)bytes, buffer.Length);
                    return 0;
                }
                catch (Exception e) // It must not unwind native code.
                {
                    failure = e;
                    return 1;
                }
            };
            ulong id = 0;
            using (var use = Handle.Hold())
            {
                int status = Native.akv_sequence_import((akv_cache*)use.Value, into, read, null, &id);
                GC.KeepAlive(read);
                if (failure != null) throw new IOException("the stream could not be read", failure);
                Library.Check(status);
            }
            return id;
        }
    }
}
