using System;
using System.IO;
using System.Runtime.InteropServices;

namespace AlignedKV
{
    /// <summary>Which channels turn together.</summary>
    public enum Pairing
    {
        /// <summary>2i and 2i + 1.</summary>
        Interleaved = Native.AKV_ROPE_INTERLEAVED,
        /// <summary>i and i + Dims / 2.</summary>
        Halves = Native.AKV_ROPE_HALVES,
    }

    /// <summary>Rotary position embedding of a layer.</summary>
    public struct Rope
    {
        /// <summary>Which channels turn together.</summary>
        public Pairing Pairing;
        /// <summary>Channels that turn: even, at most DimK.</summary>
        public int Dims;
        /// <summary>First of them.</summary>
        public int FirstDim;
        /// <summary>[Dims / 2] radians per position.</summary>
        public float[] InvFreq;
    }

    /// <summary>What of a sequence is exported. The default: everything.</summary>
    public struct Part
    {
        /// <summary>First layer.</summary>
        public int FirstLayer;
        /// <summary>Layers; 0 = all from FirstLayer on.</summary>
        public int Layers;
        /// <summary>Digit planes of K, from the first, that the importing side will have; 0 = all that are stored.</summary>
        public int PlanesK;
        /// <summary>The same of V.</summary>
        public int PlanesV;
        /// <summary>Digit planes of K that it has by an earlier export of the same tokens: only further ones are exported.</summary>
        public int KnownK;
        /// <summary>The same of V.</summary>
        public int KnownV;
    }

    /// <summary>One row of tokens of a cache.</summary>
    public sealed class Sequence : IDisposable
    {
        internal sealed unsafe class SequenceHandle : Handle
        {
            public SequenceHandle(Handle cache, ulong id) : base(cache) { Set((IntPtr)(long)id); }

            public IntPtr Cache { get { return Parent.DangerousGetHandle(); } }

            protected override int Destroy(IntPtr handle)
            {
                return Native.akv_sequence_destroy((akv_cache*)Cache, (ulong)(long)handle);
            }
        }

        internal readonly SequenceHandle Handle;
        internal readonly Cache Cache;

        /// <summary>Makes an empty sequence.</summary>
        public Sequence(Cache cache) : this(cache, Create(cache)) { }

        internal Sequence(Cache cache, ulong id)
        {
            Cache = cache;
            Handle = new SequenceHandle(cache.Handle, id);
        }

        static unsafe ulong Create(Cache cache)
        {
            using (var use = cache.Handle.Hold())
            {
                ulong id;
                Library.Check(Native.akv_sequence_create((akv_cache*)use.Value, &id));
                return id;
            }
        }

        /// <summary>Destroys the sequence, at the end of a step that it is in. Pages that forks share stay with them.</summary>
        public void Dispose() { Handle.Dispose(); }

        /// <summary>A new sequence of the first n tokens (-1 = all): whole tiles of 128 tokens are shared.</summary>
        public unsafe Sequence Fork(long n = -1)
        {
            ulong id;
            using (var use = Handle.Hold())
                Library.Check(Native.akv_sequence_fork((akv_cache*)Handle.Cache, (ulong)(long)use.Value, n, &id));
            return new Sequence(Cache, id);
        }

        /// <summary>The same sequence in another cache.</summary>
        public unsafe Sequence CopyTo(Cache cache)
        {
            ulong id;
            using (var use = Handle.Hold())
            using (var to = cache.Handle.Hold())
                Library.Check(Native.akv_sequence_copy(
                    (akv_cache*)Handle.Cache, (ulong)(long)use.Value, (akv_cache*)to.Value, &id));
            return new Sequence(cache, id);
        }

        /// <summary>Keeps the first n tokens.</summary>
        public unsafe void Truncate(long n)
        {
            using (var use = Handle.Hold())
                Library.Check(Native.akv_sequence_truncate((akv_cache*)Handle.Cache, (ulong)(long)use.Value, n));
        }

        /// <summary>Takes the memory that n more tokens need, so that steps of them do not fail for want of it. Truncate, to
        /// any length, and Dispose give back what is left.</summary>
        public unsafe void Reserve(long n)
        {
            using (var use = Handle.Hold())
                Library.Check(Native.akv_sequence_reserve((akv_cache*)Handle.Cache, (ulong)(long)use.Value, n));
        }

        /// <summary>Number of committed tokens.</summary>
        public long Length { get { return LengthIn(-1); } }

        /// <summary>Number of tokens in a layer; those that the step in progress has appended count.</summary>
        public unsafe long LengthIn(int layer)
        {
            long n;
            using (var use = Handle.Hold())
                Library.Check(Native.akv_sequence_length((akv_cache*)Handle.Cache, (ulong)(long)use.Value, layer, &n));
            return n;
        }

        /// <summary>
        /// Reads tokens first to first + n back, as attention sees them with all stored planes, in any element type. No rows
        /// leave K or V out.
        /// </summary>
        public unsafe void Read(int layer, long first, long n, Rows key, Rows value)
        {
            Cache.CheckKV(layer, n, key, value, true);
            using (var use = Handle.Hold())
                fixed (byte* k = &MemoryMarshal.GetReference(key.Read.Data))
                fixed (byte* v = &MemoryMarshal.GetReference(value.Read.Data))
                {
                    akv_rows rk = key.Read.At(k), rv = value.Read.At(v);
                    Library.Check(Native.akv_dequantize_kv((akv_cache*)Handle.Cache, (ulong)(long)use.Value, layer, first, n,
                        k == null ? null : &rk, v == null ? null : &rv, null));
                }
        }

        /// <summary>
        /// Takes out the tokens at positions from &lt;= p &lt; to: no query row sees them any more. Indices and positions of the
        /// others stay; Length counts those that were removed, but at the end, where they are cut off.
        /// </summary>
        public unsafe void Remove(long from, long to)
        {
            using (var use = Handle.Hold())
                Library.Check(Native.akv_sequence_remove((akv_cache*)Handle.Cache, (ulong)(long)use.Value, from, to));
        }

        /// <summary>Adds delta to the positions from &lt;= p &lt; to and turns their K accordingly; one Rope per layer.</summary>
        public unsafe void Shift(long from, long to, long delta, params Rope[] perLayer)
        {
            if (perLayer.Length != Cache.LayerCount) throw Library.Short("perLayer", perLayer.Length, Cache.LayerCount);
            var raw = new akv_rope[perLayer.Length];
            var pins = new GCHandle[raw.Length];
            try
            {
                for (int i = 0; i < raw.Length; i++)
                {
                    var r = perLayer[i];
                    if (r.InvFreq == null || r.InvFreq.Length < r.Dims / 2)
                        throw Library.Short("InvFreq", r.InvFreq == null ? 0 : r.InvFreq.Length, r.Dims / 2);
                    pins[i] = GCHandle.Alloc(r.InvFreq, GCHandleType.Pinned);
                    raw[i] = new akv_rope { pairing = (int)r.Pairing, n_dims = r.Dims, first_dim = r.FirstDim, inv_freq = (float*)pins[i].AddrOfPinnedObject() };
                }
                using (var use = Handle.Hold())
                    fixed (akv_rope* p = raw)
                        Library.Check(Native.akv_sequence_shift((akv_cache*)Handle.Cache, (ulong)(long)use.Value, from, to, delta, p));
            }
            finally
            {
                foreach (var pin in pins)
                    if (pin.IsAllocated) pin.Free();
            }
        }

        /// <summary>Adds layers that the sequence lacks, since it was made from a part of them.</summary>
        public void Import(Stream stream)
        {
            using (var use = Handle.Hold()) Cache.Import(stream, (ulong)(long)use.Value);
        }

        /// <summary>Writes the sequence, or a part of it, as a byte stream with version and checksums.</summary>
        public unsafe void Export(Stream stream, Part part = default(Part))
        {
            Exception failure = null;
            Native.akv_sequence_export_write_delegate write = delegate(void* user, void* bytes, UIntPtr n)
            {
                try
                {
                    var buffer = new byte[(int)n];
                    Marshal.Copy((IntPtr)bytes, buffer, 0, buffer.Length);
                    stream.Write(buffer, 0, buffer.Length);
                    return 0;
                }
                catch (Exception e) // It must not unwind native code.
                {
                    failure = e;
                    return 1;
                }
            };
            var d = new akv_export_desc
            {
                struct_size = (uint)sizeof(akv_export_desc), first_layer = part.FirstLayer, n_layers = part.Layers,
                planes_k = part.PlanesK, planes_v = part.PlanesV, known_k = part.KnownK, known_v = part.KnownV,
            };
            using (var use = Handle.Hold())
            {
                int status = Native.akv_sequence_export((akv_cache*)Handle.Cache, (ulong)(long)use.Value, &d, write, null);
                GC.KeepAlive(write);
                if (failure != null) throw new IOException("the stream could not be written", failure);
                Library.Check(status);
            }
        }
    }
}
