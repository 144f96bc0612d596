using System;
using System.Collections.Generic;
using System.IO;
using System.Runtime.InteropServices;
using System.Threading;

namespace AlignedKV
{
    /// <summary>The classes against arithmetic in double, their errors, and who lives how long.</summary>
    static partial class Tests
    {
        const int QHeads = 6, KVHeads = 2, Dim = 32;
        static int checks, failures;

        static void Check(bool condition, string what)
        {
            checks++;
            if (condition) return;
            failures++;
            Console.WriteLine("failed: " + what);
        }

        static void Fails<E>(string word, Action call) where E : Exception
        {
            try { call(); }
            catch (E e)
            {
                Check(e.Message.Contains(word), "'" + e.Message + "' does not name " + word);
                return;
            }
            catch (Exception e)
            {
                Check(false, "expected " + typeof(E).Name + " (" + word + "), got " + e);
                return;
            }
            Check(false, "expected " + typeof(E).Name + " (" + word + "), and it succeeded");
        }

        static void Fails(Status status, string word, Action call)
        {
            Fails<AlignedKVException>(word, delegate
            {
                try { call(); }
                catch (AlignedKVException e)
                {
                    Check(e.Status == status, "expected " + status + ", got " + e.Message);
                    throw;
                }
            });
        }

        static void Lies<T>(int size, params string[] fields) where T : struct
        {
            Check(Marshal.SizeOf(typeof(T)) == size, typeof(T) + " has " + Marshal.SizeOf(typeof(T)) + " bytes, expected " + size);
            foreach (var field in fields)
            {
                var words = field.Split(' ');
                int at = (int)Marshal.OffsetOf(typeof(T), words[0]);
                Check(at == int.Parse(words[1]), typeof(T) + "." + words[0] + " is at " + at + ", expected " + words[1]);
            }
        }

        static readonly Random random = new Random(1);

        static float[] Normal(int n)
        {
            var x = new float[n];
            for (int i = 0; i < n; i++)
                x[i] = (float)(Math.Sqrt(-2 * Math.Log(1 - random.NextDouble())) * Math.Cos(2 * Math.PI * random.NextDouble()));
            return x;
        }

        static CacheOptions Options() { return new CacheOptions(new Layer { QHeads = QHeads, KVHeads = KVHeads, DimK = Dim }); }

        static void Step(Batch batch, Sequence sequence, int n, ReadOnlyRows key, ReadOnlyRows value)
        {
            batch.Begin(new[] { sequence }, new[] { n }, new[] { 0 });
            batch.Append(0, key, value);
            batch.Commit();
        }

        /// <summary>Attention of one query row in double over the first n rows.</summary>
        static double[] Truth(float[] q, float[] k, float[] v, int n, int head)
        {
            int kv = head / (QHeads / KVHeads);
            var scores = new double[n];
            double top = double.NegativeInfinity, total = 0;
            for (int i = 0; i < n; i++)
            {
                for (int c = 0; c < Dim; c++) scores[i] += (double)q[head * Dim + c] * k[(i * KVHeads + kv) * Dim + c];
                scores[i] /= Math.Sqrt(Dim);
                top = Math.Max(top, scores[i]);
            }
            var result = new double[Dim];
            for (int i = 0; i < n; i++)
            {
                double p = Math.Exp(scores[i] - top);
                total += p;
                for (int c = 0; c < Dim; c++) result[c] += p * v[(i * KVHeads + kv) * Dim + c];
            }
            for (int c = 0; c < Dim; c++) result[c] /= total;
            return result;
        }

        static void WithinBounds()
        {
            foreach (Mode mode in Enum.GetValues(typeof(Mode)))
                foreach (int n in new[] { 1, 127, 128, 129, 700 })
                    using (var context = new Context())
                    using (var cache = new Cache(context, Options()))
                    using (var sequence = new Sequence(cache))
                    using (var batch = new Batch(cache))
                    {
                        float[] k = Normal(n * KVHeads * Dim), v = Normal(n * KVHeads * Dim), q = Normal(QHeads * Dim);
                        float[] output = new float[QHeads * Dim], bound = new float[QHeads], lse = new float[QHeads];
                        batch.Begin(new[] { sequence }, new[] { n }, new[] { 1 });
                        batch.Append(0, k, v);
                        var call = new AttentionCall { Q = q, Out = output, Mode = mode, Bound = bound, Lse = lse };
                        Stats stats;
                        batch.Attention(0, in call, out stats);
                        batch.Commit();
                        bool within = true;
                        for (int head = 0; head < QHeads; head++)
                        {
                            var truth = Truth(q, k, v, n, head);
                            for (int c = 0; c < Dim; c++) within &= Math.Abs(truth[c] - output[head * Dim + c]) <= bound[head];
                        }
                        string what = mode + ", " + n + " tokens";
                        Check(within && bound[0] <= 1, what + ": beyond the bound");
                        Check(stats.Tokens == (ulong)(n * KVHeads) && stats.Backend == Backend.Cpu && stats.BytesK > 0, what + ": statistics");
                        ulong planes = 0;
                        for (int i = 0; i <= 4; i++) planes += stats.PlanesK(i);
                        Check(mode == Mode.Exact || planes + 4 * KVHeads >= stats.Tokens, what + ": planes");
                        Check(sequence.Length == n, what + ": length");
                    }
        }

        static void ElementTypesAndStrides()
        {
            const int n = 40;
            float[] k = Normal(n * KVHeads * Dim), v = Normal(n * KVHeads * Dim), q = Normal(QHeads * Dim);
            var halves = new Float16[k.Length];
            var brains = new BFloat16[v.Length];
            for (int i = 0; i < k.Length; i++)
            {
                halves[i] = (Float16)k[i];
                brains[i] = (BFloat16)v[i];
                k[i] = halves[i];
                v[i] = brains[i];
            }
            var turned = new BFloat16[v.Length]; // heads outside rows
            for (int i = 0; i < n; i++)
                for (int h = 0; h < KVHeads; h++) Array.Copy(brains, (i * KVHeads + h) * Dim, turned, (h * n + i) * Dim, Dim);
            var outputs = new float[3][];
            for (int i = 0; i < 3; i++)
            {
                var options = Options();
                if (i < 2) options.Layers[0].DTypeK = DType.F16;
                if (i < 2) options.Layers[0].DTypeV = DType.BF16;
                using (var context = new Context())
                using (var cache = new Cache(context, options))
                using (var sequence = new Sequence(cache))
                using (var batch = new Batch(cache))
                {
                    batch.Begin(new[] { sequence }, new[] { n }, new[] { 1 });
                    if (i == 0) batch.Append(0, halves, brains);
                    if (i == 1) batch.Append(0, halves, new ReadOnlyRows(turned, Dim, n * Dim));
                    if (i == 2) batch.Append(0, k, v);
                    outputs[i] = new float[QHeads * Dim];
                    var call = new AttentionCall { Q = q, Out = outputs[i], Mode = Mode.Exact };
                    batch.Attention(0, in call);
                    batch.Commit();
                    var back = new Float16[KVHeads * Dim];
                    sequence.Read(0, 1, 1, back, default(Rows)); // in the exact head
                    bool same = true;
                    for (int c = 0; c < back.Length; c++) same &= back[c].Bits == halves[back.Length + c].Bits;
                    Check(same, "rows read back");
                    for (int c = 0; c < outputs[i].Length; c++) same &= outputs[i][c] == outputs[0][c];
                    Check(same, "case " + i + ": the same values give another output");
                }
            }
        }

        static void ForksStepsStreams()
        {
            using (var context = new Context())
            using (var cache = new Cache(context, Options()))
            using (var sequence = new Sequence(cache))
            using (var batch = new Batch(cache))
            {
                const int n = 300;
                float[] k = Normal(n * KVHeads * Dim), v = Normal(n * KVHeads * Dim);
                Step(batch, sequence, n, k, v);
                using (var fork = sequence.Fork(200))
                {
                    fork.Truncate(150);
                    var usage = cache.Usage;
                    Check(fork.Length == 150 && usage.Sequences == 2 && usage.PagesShared == 1 && usage.Tokens == n + 150, "fork");
                    batch.Begin(new[] { fork }, new[] { 1 });
                    batch.Append(0, k, v);
                    Check(fork.LengthIn(0) == 151, "a token in the step");
                    batch.Abort();
                    Check(fork.Length == 150, "aborted");
                    Fails(Status.Argument, "1000", delegate { fork.Truncate(1000); });
                    batch.Begin(new[] { fork }, new[] { 0 });
                }
                Check(cache.Usage.Sequences == 2, "a disposed sequence is there until its step ends");
                batch.Commit();
                Check(cache.Usage.Sequences == 1, "and not beyond");

                float[] before = new float[k.Length], after = new float[k.Length];
                sequence.Read(0, 0, n, before, default(Rows));
                var stream = new MemoryStream();
                sequence.Export(stream);
                stream.Position = 0;
                using (var copied = cache.Import(stream)) copied.Read(0, 0, n, after, default(Rows));
                bool same = stream.Position == stream.Length;
                for (int i = 0; i < before.Length; i++) same &= before[i] == after[i];
                Check(same, "imported rows");
                var damaged = stream.ToArray();
                damaged[damaged.Length / 2] ^= 1;
                Fails(Status.Corrupt, "", delegate { cache.Import(new MemoryStream(damaged)); });
                Fails<IOException>("read", delegate { cache.Import(new MemoryStream(damaged, 0, 100)); });
                Fails<IOException>("written", delegate { sequence.Export(new MemoryStream(new byte[10])); });
                var some = new MemoryStream();
                Built(delegate { sequence.Export(some, new Part { PlanesK = 1, PlanesV = 1 }); });
                Check(some.Length < stream.Length, "one plane takes less than all");
                Fails(Status.Argument, "first_layer", delegate { sequence.Export(some, new Part { FirstLayer = 7 }); });
                Fails(Status.Argument, "", delegate { sequence.Import(new MemoryStream(stream.ToArray())); }); // it lacks no layer
                var still = new Rope { Dims = Dim, InvFreq = new float[Dim / 2] };
                if (Built(delegate { sequence.Shift(0, n, 10, still); })) Check(sequence.Length == n, "shifted");
                Fails<ArgumentException>("perLayer", delegate { sequence.Shift(0, n, 10); });
                Fails<ArgumentException>("InvFreq", delegate { sequence.Shift(0, n, 10, new Rope { Dims = Dim }); });
                if (Built(delegate { sequence.Remove(0, 1000); })) Check(sequence.Length == 0, "removed");
            }
        }

        /// <summary>Whether the library has what a call needs.</summary>
        static bool Built(Action call)
        {
            try { call(); }
            catch (AlignedKVException e)
            {
                if (e.Status != Status.Unsupported) throw;
                return false;
            }
            return true;
        }

        static void CellsAndMasks()
        {
            const int slots = 300, n = 50;
            var options = Options();
            options.Placement = Placement.Slots;
            options.Slots = slots;
            using (var context = new Context())
            using (var cache = new Cache(context, options))
            using (var mask = new Mask(context, 1, slots))
            {
                float[] k = Normal(n * KVHeads * Dim), v = Normal(n * KVHeads * Dim), q = Normal(QHeads * Dim), output = new float[QHeads * Dim];
                var cells = new long[n];
                for (int i = 0; i < n; i++) cells[i] = 100 + i;
                cache.WriteSlots(0, cells, k, v);
                var shown = new Float16[slots];
                for (int i = 0; i < slots; i++) shown[i] = (Float16)float.NegativeInfinity;
                shown[107] = (Float16)0f;
                mask.Set(0, 1, slots, shown);
                var spans = new[] { new Cells { Queries = 1, KV = slots } };
                var call = new AttentionCall { Q = q, Out = output, Mask = mask };
                cache.SlotsAttention(0, spans, in call);
                bool near = true;
                for (int i = 0; i < output.Length; i++)
                    near &= Math.Abs(output[i] - v[(7 * KVHeads + i / Dim / (QHeads / KVHeads)) * Dim + i % Dim]) < 1e-2;
                Check(near, "the one cell that is shown");
                var back = new float[v.Length];
                cache.CopySlots(-1, 100, 10, n);
                cache.ReadSlots(0, 100, n, default(Rows), back);
                for (int i = 0; i < back.Length; i++) near &= back[i] == v[i];
                Check(near, "cells read back");
                cache.InvalidateSlots(0, 0, slots);
                Fails(Status.Argument, "slots[0]", delegate { cache.WriteSlots(0, new long[] { slots }, k, v); });
                Fails<ArgumentException>("key", delegate { cache.WriteSlots(0, cells, k.AsSpan(1), v); });
                Fails<ArgumentException>("values", delegate { mask.Set(0, 1, slots, shown.AsSpan(1)); });
                Fails(Status.Capacity, "n_kv", delegate { mask.Set(0, 1, slots + 1, new Float16[slots + 1]); });
                mask.Dispose();
                Fails<ObjectDisposedException>("", delegate
                {
                    var again = new AttentionCall { Q = q, Out = output, Mask = mask };
                    cache.SlotsAttention(0, spans, in again);
                });
            }

            options.Placement = Placement.Attached;
            using (var context = new Context())
            using (var cache = new Cache(context, options))
            {
                float[] q = Normal(QHeads * Dim), output = new float[QHeads * Dim];
                double[] truth = Attach(cache, q, slots);
                for (int i = 0; i < 3; i++) GC.Collect();
                var cells = new long[slots];
                for (int i = 0; i < slots; i++) cells[i] = i;
                cache.WriteSlots(0, cells, default(ReadOnlyRows), default(ReadOnlyRows));
                var call = new AttentionCall { Q = q, Out = output, Mode = Mode.Exact };
                cache.SlotsAttention(0, new[] { new Cells { Queries = 1, KV = slots } }, in call);
                bool near = true;
                for (int c = 0; c < Dim; c++) near &= Math.Abs(truth[c] - output[c]) < 1e-3;
                Check(near, "attached rows that only the cache knows");
            }
        }

        static double[] Attach(Cache cache, float[] q, int slots)
        {
            float[] k = Normal(slots * KVHeads * Dim), v = Normal(slots * KVHeads * Dim);
            Fails<ArgumentException>("key", delegate { cache.Attach(0, new float[1], v); });
            cache.Attach(0, k, v);
            return Truth(q, k, v, slots, 0);
        }

        static void Merge()
        {
            using (var context = new Context())
            using (var cache = new Cache(context, Options()))
            using (var sequence = new Sequence(cache))
            using (var batch = new Batch(cache))
            {
                const int n = 300, cut = 100;
                Step(batch, sequence, n, Normal(n * KVHeads * Dim), Normal(n * KVHeads * Dim));
                var q = Normal(QHeads * Dim);
                var states = new State[4]; // two parts, the whole, the parts merged
                batch.Begin(new[] { sequence }, new[] { 0 }, new[] { 1 });
                for (int i = 0; i < 4; i++)
                {
                    states[i] = new State { Out = new float[QHeads * Dim], Lse = new float[QHeads] };
                    if (i == 3) break;
                    var call = new AttentionCall { Q = q, Out = states[i].Out, Lse = states[i].Lse, Mode = Mode.Exact };
                    if (i == 0) call.KVTo = new long[] { cut };
                    if (i == 1) call.KVFrom = new long[] { cut };
                    batch.Attention(0, in call);
                }
                batch.Commit();
                var parts = new[] { states[0], states[1] };
                context.MergeStates(parts, 1, QHeads, Dim, states[3]);
                bool near = true;
                for (int i = 0; i < QHeads * Dim; i++) near &= Math.Abs(states[2].Out[i] - states[3].Out[i]) < 1e-5;
                Check(near, "merged parts");
                Fails<ArgumentException>("Out", delegate { context.MergeStates(parts, 2, QHeads, Dim, states[3]); });
                Fails(Status.Argument, "n is 0", delegate { context.MergeStates(new State[0], 1, QHeads, Dim, states[3]); });
            }
        }

        static void Errors()
        {
            Fails(Status.Argument, "n_threads", delegate { new Context(new ContextOptions { Threads = -1 }); });
            var context = new Context();
            Fails(Status.Argument, "dim_k is 17", delegate { new Cache(context, new CacheOptions(new Layer { QHeads = 1, KVHeads = 1, DimK = 17 })); });
            Fails(Status.Argument, "n_q_heads", delegate { context.Supports(new CacheOptions(new Layer { QHeads = 5, KVHeads = 2, DimK = 64 })); });
            Check(context.Supports(Options()) == (AttentionPath.Progressive | AttentionPath.Dense), "paths");
            context.Poll();
            var options = Options();
            options.MaxBytes = 1 << 20;
            var cache = new Cache(context, options);
            var sequence = new Sequence(cache);
            var batch = new Batch(cache);
            var one = new[] { sequence };
            float[] rows = new float[100 * KVHeads * Dim], output = new float[10 * QHeads * Dim];
            Fails(Status.Capacity, "max_bytes", delegate { batch.Begin(one, new[] { 1000000 }); });
            Fails<ArgumentException>("newTokens", delegate { batch.Begin(new[] { sequence, sequence }, new[] { 1 }); });
            Fails(Status.Argument, "", delegate { batch.Begin(new[] { sequence, sequence }, new[] { 1, 1 }); });
            Fails<ArgumentException>("sequences", delegate { batch.Begin(new Sequence[] { null }, new[] { 1 }); });
            Fails(Status.Argument, "", delegate { batch.Commit(); });
            batch.Begin(one, new[] { 10 });
            Fails<ArgumentException>("key", delegate { batch.Append(0, rows.AsSpan(0, 10 * KVHeads * Dim - 1), rows); });
            Fails<ArgumentException>("value", delegate { batch.Append(0, rows, new ReadOnlyRows(rows, 1L << 58, 0)); });
            Fails(Status.Argument, "layer", delegate { batch.Append(7, rows, rows); });
            var nan = (float[])rows.Clone();
            nan[0] = float.NaN;
            Fails(Status.Nonfinite, "", delegate { batch.Append(0, nan, rows); });
            batch.Append(0, rows, rows);
            Fails<ArgumentException>("Out", delegate { var call = new AttentionCall { Q = rows, Out = output.AsSpan(1) }; batch.Attention(0, in call); });
            Fails<ArgumentException>("Bound", delegate { var call = new AttentionCall { Q = rows, Out = output, Bound = new float[1] }; batch.Attention(0, in call); });
            Fails(Status.Argument, "mode is 9", delegate { var call = new AttentionCall { Q = rows, Out = output, Mode = (Mode)9 }; batch.Attention(0, in call); });

            // In any order, and twice: what is in use stays until it is not.
            context.Dispose();
            cache.Dispose();
            batch.Commit();
            Check(sequence.Length == 10, "a sequence keeps its cache");
            Fails<ObjectDisposedException>("", delegate { new Sequence(cache); });
            Fails<ObjectDisposedException>("", delegate { new Cache(context, options); });
            for (int i = 0; i < 2; i++)
            {
                batch.Dispose();
                sequence.Dispose();
                cache.Dispose();
                context.Dispose();
            }
            Fails<ObjectDisposedException>("", delegate { batch.Begin(one, new[] { 1 }); });
            Fails<ObjectDisposedException>("", delegate { batch.Append(0, rows, rows); });
            Fails<ObjectDisposedException>("", delegate { var call = new AttentionCall { Q = rows, Out = output }; batch.Attention(0, in call); });
            Fails<ObjectDisposedException>("", delegate { Console.WriteLine(sequence.Length); });
        }

        static void Log()
        {
            var lines = new List<string>();
            using (new Context(new ContextOptions { Log = delegate(LogLevel level, string text) { lines.Add(text); throw new Exception("a log that fails"); } })) { }
            Check(lines.Count > 0 && lines[0].Contains("cpu"), "log");
            Check(Library.Version.StartsWith("alignedkv "), Library.Version);
            Check(Native.akv_abi_version() == Native.AKV_ABI_VERSION, "ABI version");
        }

        static void Drop(Cache cache, int n)
        {
            for (int i = 0; i < n; i++)
            {
                var sequence = new Sequence(cache);
                new Batch(cache).Begin(new[] { sequence }, new[] { 1 });
            }
        }

        static void CollectorFrees()
        {
            using (var context = new Context())
            using (var cache = new Cache(context, Options()))
            {
                var thread = new Thread(delegate() { Drop(cache, 100); }); // so that no register or stack keeps one
                thread.Start();
                thread.Join();
                long left = 100;
                for (int i = 0; i < 200 && (left = cache.Usage.Sequences) > 0; i++)
                {
                    GC.Collect();
                    GC.WaitForPendingFinalizers();
                    Thread.Sleep(5);
                }
                Check(left <= 2, left + " sequences are left"); // a conservative collector may keep what looks referenced
            }
        }

        static void ManyThreads()
        {
            using (var context = new Context())
            using (var cache = new Cache(context, Options()))
            {
                float[] k = Normal(100 * KVHeads * Dim), v = Normal(k.Length), q = Normal(QHeads * Dim);
                var truth = Truth(q, k, v, 100, 0);
                var threads = new Thread[4];
                int wrong = 0;
                for (int t = 0; t < threads.Length; t++)
                {
                    int number = t;
                    threads[t] = new Thread(delegate()
                    {
                        try
                        {
                            using (var sequence = new Sequence(cache))
                            using (var batch = new Batch(cache))
                            {
                                float[] output = new float[QHeads * Dim], bound = new float[QHeads];
                                for (int i = 0; i < 100; i++)
                                {
                                    batch.Begin(new[] { sequence }, new[] { 1 });
                                    batch.Append(0, k.AsSpan(i * KVHeads * Dim), v.AsSpan(i * KVHeads * Dim));
                                    var call = new AttentionCall { Q = q, Out = output, Bound = bound };
                                    batch.Attention(0, in call);
                                    batch.Commit();
                                    try { sequence.Truncate(1000 * number + 1000); }
                                    catch (AlignedKVException e)
                                    {
                                        if (!e.Message.Contains((1000 * number + 1000).ToString())) Interlocked.Increment(ref wrong);
                                    }
                                }
                                for (int c = 0; c < Dim; c++)
                                    if (Math.Abs(truth[c] - output[c]) > bound[0]) Interlocked.Increment(ref wrong);
                            }
                        }
                        catch (Exception e)
                        {
                            Console.WriteLine(e);
                            Interlocked.Increment(ref wrong);
                        }
                    });
                    threads[t].Start();
                }
                foreach (var thread in threads) thread.Join();
                Check(wrong == 0, wrong + " results or texts of threads are wrong");
            }
        }

        static void Floats()
        {
            bool right = true;
            for (int bits = 0; bits < 1 << 16; bits++)
            {
                float half = new Float16((ushort)bits), brain = new BFloat16((ushort)bits);
                right &= float.IsNaN(half) ? float.IsNaN((Float16)half) : ((Float16)half).Bits == bits;
                right &= float.IsNaN(brain) ? float.IsNaN((BFloat16)brain) : ((BFloat16)brain).Bits == bits;
            }
            Check(right, "16-bit numbers there and back");
            foreach (var pair in new Dictionary<float, int> { { 1, 0x3c00 }, { -2, 0xc000 }, { 65504, 0x7bff }, { 65520, 0x7c00 }, { 1e30f, 0x7c00 }, { 5.9604645e-8f, 1 }, { 2.9802322e-8f, 0 }, { 8.940697e-8f, 2 } })
                Check(((Float16)pair.Key).Bits == pair.Value, pair.Key + " as binary16");
            for (int i = 0; i < 100000; i++)
            {
                float x = FloatBits.From((uint)random.Next() * 2 + (uint)random.Next(2));
                if (float.IsNaN(x) || Math.Abs(x) >= 65504) continue;
                var got = (Float16)x;
                double off = Math.Abs((double)(float)got - x);
                for (int other = got.Bits - 1; other <= got.Bits + 1; other += 2)
                {
                    double d = Math.Abs((double)(float)new Float16((ushort)other) - x);
                    right &= !(d < off || d == off && (got.Bits & 1) == 1);
                }
            }
            Check(right, "to the nearest, ties to even");
        }

        static int Main()
        {
            Layout();
            Floats();
            WithinBounds();
            ElementTypesAndStrides();
            ForksStepsStreams();
            CellsAndMasks();
            Merge();
            Errors();
            Log();
            CollectorFrees();
            ManyThreads();
            Console.WriteLine("csharp: {0} passed, {1} failed", checks - failures, failures);
            return failures == 0 ? 0 : 1;
        }
    }
}
