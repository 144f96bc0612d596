// trace.c through the C# classes.
using System;
using System.IO;
using AlignedKV;

static class Trace
{
    static ulong hash = 0xcbf29ce484222325; // FNV-1a

    static void Add(float[] values)
    {
        foreach (float x in values)
            foreach (byte b in BitConverter.GetBytes(x)) hash = unchecked((hash ^ b) * 0x100000001b3);
    }

    static Float16[] Read(BinaryReader file, int n)
    {
        var values = new Float16[n];
        for (int i = 0; i < n; i++) values[i] = new Float16(file.ReadUInt16());
        return values;
    }

    static void Main(string[] arguments)
    {
        using (var file = new BinaryReader(File.OpenRead(arguments[0])))
        {
            int qHeads = file.ReadInt32(), kvHeads = file.ReadInt32(), dim = file.ReadInt32(), prompt = file.ReadInt32(), steps = file.ReadInt32();
            int kvRow = kvHeads * dim, qRow = qHeads * dim;
            Float16[] k = Read(file, kvRow * (prompt + steps)), v = Read(file, kvRow * (prompt + steps)), q = Read(file, qRow * steps);
            float[] output = new float[qRow], lse = new float[qHeads], bound = new float[qHeads];

            var layer = new Layer { QHeads = qHeads, KVHeads = kvHeads, DimK = dim, DTypeK = DType.F16, DTypeV = DType.F16 };
            using (var context = new Context())
            using (var cache = new Cache(context, new CacheOptions(layer)))
            using (var sequence = new Sequence(cache))
            using (var batch = new Batch(cache))
            {
                var sequences = new[] { sequence };
                for (int i = -1; i < steps; i++) // -1: the prompt, without attention
                {
                    int at = i < 0 ? 0 : kvRow * (prompt + i);
                    batch.Begin(sequences, new[] { i < 0 ? prompt : 1 }, new[] { i < 0 ? 0 : 1 });
                    batch.Append(0, k.AsSpan(at), v.AsSpan(at));
                    if (i >= 0)
                    {
                        var call = new AttentionCall { Q = q.AsSpan(qRow * i), Out = output, Lse = lse, Bound = bound };
                        batch.Attention(0, in call);
                        Add(output);
                        Add(lse);
                        Add(bound);
                    }
                    batch.Commit();
                }
            }
        }
        Console.WriteLine("{0:x16}", hash);
    }
}
