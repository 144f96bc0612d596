// The calls of overhead.c from C#, measured the same way.
using System;
using System.Diagnostics;
using AlignedKV;

static class Overhead
{
    static void Measure(string name, int n, Action<int> calls)
    {
        double best = 1e300;
        for (int run = 0; run < 400; run++)
        {
            long start = Stopwatch.GetTimestamp();
            calls(n);
            best = Math.Min(best, 1e9 * (Stopwatch.GetTimestamp() - start) / Stopwatch.Frequency / n);
        }
        Console.WriteLine("{0} {1:f1}", name, best);
    }

    static void Main()
    {
        using (var context = new Context())
        using (var cache = new Cache(context, new CacheOptions(new Layer { QHeads = 1, KVHeads = 1, DimK = 16 })))
        using (var sequence = new Sequence(cache))
        using (var batch = new Batch(cache))
        {
            Measure("length", 2000, delegate(int n) { for (int i = 0; i < n; i++) sequence.LengthIn(-1); });

            float[] x = new float[16], output = new float[16], lse = new float[1], bound = new float[1], estimate = new float[1];
            Action<int> attend = delegate(int n)
            {
                Stats stats;
                var call = new AttentionCall { Q = x, Out = output, Lse = lse, Bound = bound, Estimate = estimate };
                for (int i = 0; i < n; i++) batch.Attention(0, in call, out stats);
            };
            var sequences = new[] { sequence };
            batch.Begin(sequences, new[] { 1 });
            batch.Append(0, x, x);
            batch.Commit();
            batch.Begin(sequences, new[] { 0 }, new[] { 0 }); // No query row: what is left is the call itself.
            Measure("attention", 300, attend);
            batch.Abort();
            batch.Begin(sequences, new[] { 0 }, new[] { 1 });
            Measure("attention_row", 100, attend);
        }
    }
}
