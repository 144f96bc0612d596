using System;
using System.Runtime.InteropServices;

namespace AlignedKV
{
    /// <summary>What computes.</summary>
    public enum Backend
    {
        /// <summary>The default: Cpu.</summary>
        Default = 0,
        /// <summary>The CPU.</summary>
        Cpu = Native.AKV_CPU,
        /// <summary>A CUDA device.</summary>
        Cuda = Native.AKV_CUDA,
    }

    /// <summary>An instruction set.</summary>
    public enum Isa
    {
        /// <summary>The best of the machine.</summary>
        Best = 0,
        /// <summary>Portable code.</summary>
        Scalar = Native.AKV_ISA_SCALAR,
        /// <summary>x86-64 with AVX2, FMA and F16C.</summary>
        Avx2 = Native.AKV_ISA_AVX2,
        /// <summary>x86-64 with AVX-512 F, BW, VL and VNNI.</summary>
        Avx512 = Native.AKV_ISA_AVX512,
    }

    /// <summary>Ways that attention can take.</summary>
    [Flags]
    public enum AttentionPath
    {
        /// <summary>None.</summary>
        None = 0,
        /// <summary>Plane 0 of all keys first, then only the digits that matter.</summary>
        Progressive = Native.AKV_PATH_PROGRESSIVE,
        /// <summary>Every stored digit of every row.</summary>
        Dense = Native.AKV_PATH_DENSE,
        /// <summary>The criterion of the published AlignedKV scheme.</summary>
        Published = Native.AKV_PATH_PUBLISHED,
    }

    /// <summary>Tells lines of the log apart.</summary>
    public enum LogLevel
    {
        /// <summary>Something the caller should know of.</summary>
        Warn = Native.AKV_LOG_WARN,
        /// <summary>What runs and where.</summary>
        Info = Native.AKV_LOG_INFO,
    }

    /// <summary>What a context is made of. The defaults: the CPU, its best instruction set, no threads, no log.</summary>
    public sealed class ContextOptions
    {
        /// <summary>What computes.</summary>
        public Backend Backend { get; set; }
        /// <summary>CUDA device ordinal.</summary>
        public int Device { get; set; }
        /// <summary>Instruction set.</summary>
        public Isa Isa { get; set; }
        /// <summary>Threads that attention may use, the calling one included.</summary>
        public int Threads { get; set; }
        /// <summary>Receives lines of text, on any thread; it must not call the library. What it throws is lost.</summary>
        public Action<LogLevel, string> Log { get; set; }
    }

    /// <summary>
    /// A backend and its threads; everything else is made from one. May be used by any number of threads at once. What was
    /// made from it keeps it alive beyond Dispose.
    /// </summary>
    public sealed class Context : IDisposable
    {
        [UnmanagedFunctionPointer(CallingConvention.Cdecl)]
        unsafe delegate void LogFunction(void* user, int level, byte* text);

        internal sealed unsafe class ContextHandle : Handle
        {
            public ContextHandle() : base(null) { }

            /// <summary>What native code calls must live as long as it may.</summary>
            public Delegate Log;

            protected override int Destroy(IntPtr handle) { return Native.akv_context_destroy((akv_context*)handle); }
        }

        internal readonly ContextHandle Handle = new ContextHandle();

        /// <summary>Makes a context.</summary>
        public unsafe Context(ContextOptions options = null)
        {
            var o = options ?? new ContextOptions();
            var d = new akv_context_desc
            {
                struct_size = (uint)sizeof(akv_context_desc), abi_version = Native.AKV_ABI_VERSION, backend = (int)o.Backend,
                device = o.Device, isa = (int)o.Isa, n_threads = o.Threads,
            };
            if (o.Log != null)
            {
                var log = o.Log;
                LogFunction function = delegate(void* user, int level, byte* text)
                {
                    try { log((LogLevel)level, Library.Text(text)); }
                    catch (Exception) { } // It must not unwind native code.
                };
                Handle.Log = function;
                d.log = (void*)Marshal.GetFunctionPointerForDelegate(function);
            }
            akv_context* context;
            Library.Check(Native.akv_context_create(&d, &context));
            Handle.Set((IntPtr)context);
        }

        /// <summary>Destroys the context, or leaves it to what was made from it.</summary>
        public void Dispose() { Handle.Dispose(); }

        /// <summary>By which paths such a cache can be attended; throws what making it would throw.</summary>
        public unsafe AttentionPath Supports(CacheOptions cache)
        {
            using (var use = Handle.Hold())
            {
                var layers = cache.RawLayers();
                int path;
                fixed (akv_layer_desc* p = layers)
                {
                    var d = cache.Raw(p);
                    Library.Check(Native.akv_supports((akv_context*)use.Value, &d, null, &path));
                }
                return (AttentionPath)path;
            }
        }

        /// <summary>Throws and clears the first fault of work that was launched on a device.</summary>
        public unsafe void Poll()
        {
            using (var use = Handle.Hold()) Library.Check(Native.akv_poll((akv_context*)use.Value, null, null, null));
        }

        /// <summary>
        /// Merges partial states over disjoint parts of a context into the state of the whole. Of every state: Out
        /// [rows][heads][dim] and Lse [rows][heads] are needed; Bound to Amplitude may be null. The arrays of result may be
        /// those of one of the states.
        /// </summary>
        public unsafe void MergeStates(State[] states, int rows, int heads, int dim, State result)
        {
            var pins = new GCHandle[6 * (states.Length + 1)];
            int pinned = 0;
            try
            {
                var raw = new akv_state[states.Length + 1];
                for (int i = 0; i < raw.Length; i++)
                    raw[i] = (i < states.Length ? states[i] : result).Raw(rows, heads, dim, pins, ref pinned);
                using (var use = Handle.Hold())
                    fixed (akv_state* p = raw)
                        Library.Check(Native.akv_merge_states((akv_context*)use.Value, p, states.Length, rows, heads, dim, p + states.Length, null));
            }
            finally
            {
                while (pinned > 0) pins[--pinned].Free();
            }
        }
    }

    /// <summary>Partial attention over a part of a context, as attention writes it.</summary>
    public struct State
    {
        /// <summary>Outputs [rows][heads][dim].</summary>
        public float[] Out;
        /// <summary>[rows][heads], as the others.</summary>
        public float[] Lse;
        /// <summary>Certificates, or null.</summary>
        public float[] Bound;
        /// <summary>Certificates of Lse, or null.</summary>
        public float[] LseBound;
        /// <summary>Expected errors, or null.</summary>
        public float[] Estimate;
        /// <summary>What tolerances are relative to, or null.</summary>
        public float[] Amplitude;

        internal unsafe akv_state Raw(long rows, long heads, long dim, GCHandle[] pins, ref int pinned)
        {
            return new akv_state
            {
                @out = Pin("Out", Out, rows * heads * dim, pins, ref pinned), lse = Pin("Lse", Lse, rows * heads, pins, ref pinned),
                bound = Pin("Bound", Bound, rows * heads, pins, ref pinned),
                lse_bound = Pin("LseBound", LseBound, rows * heads, pins, ref pinned),
                estimate = Pin("Estimate", Estimate, rows * heads, pins, ref pinned),
                amplitude = Pin("Amplitude", Amplitude, rows * heads, pins, ref pinned),
            };
        }

        static unsafe float* Pin(string name, float[] array, long need, GCHandle[] pins, ref int pinned)
        {
            if (array == null) return null;
            if (array.Length < need) throw Library.Short(name, array.Length, need);
            pins[pinned] = GCHandle.Alloc(array, GCHandleType.Pinned);
            return (float*)pins[pinned++].AddrOfPinnedObject();
        }
    }
}
