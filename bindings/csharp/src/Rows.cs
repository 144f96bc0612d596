using System;
using System.Runtime.InteropServices;

namespace AlignedKV
{
    /// <summary>Type of the elements of rows.</summary>
    public enum DType
    {
        /// <summary>IEEE binary32.</summary>
        F32 = Native.AKV_F32,
        /// <summary>IEEE binary16.</summary>
        F16 = Native.AKV_F16,
        /// <summary>The upper half of a binary32.</summary>
        BF16 = Native.AKV_BF16,
    }

    /// <summary>
    /// An array [row][head][dim] that is only read, over memory of the caller's: nothing is copied. Arrays and spans of
    /// float, Float16 and BFloat16 become rows by themselves. The default stands for no rows.
    /// </summary>
    public readonly ref struct ReadOnlyRows
    {
        internal readonly ReadOnlySpan<byte> Data;
        internal readonly DType Type;
        internal readonly long StrideRow, StrideHead;

        internal ReadOnlyRows(ReadOnlySpan<byte> data, DType type, long strideRow, long strideHead)
        {
            int size = type == DType.F32 ? 4 : 2;
            Data = data;
            Type = type;
            StrideRow = checked(strideRow * size);
            StrideHead = checked(strideHead * size);
        }

        /// <summary>Rows with strides in elements, from a row and from a head to the next; 0 = contiguous.</summary>
        public ReadOnlyRows(ReadOnlySpan<float> data, long strideRow, long strideHead)
            : this(MemoryMarshal.AsBytes(data), DType.F32, strideRow, strideHead) { }
        /// <summary>Rows with strides in elements, from a row and from a head to the next; 0 = contiguous.</summary>
        public ReadOnlyRows(ReadOnlySpan<Float16> data, long strideRow, long strideHead)
            : this(MemoryMarshal.AsBytes(data), DType.F16, strideRow, strideHead) { }
        /// <summary>Rows with strides in elements, from a row and from a head to the next; 0 = contiguous.</summary>
        public ReadOnlyRows(ReadOnlySpan<BFloat16> data, long strideRow, long strideHead)
            : this(MemoryMarshal.AsBytes(data), DType.BF16, strideRow, strideHead) { }

        /// <summary>Contiguous rows.</summary>
        public static implicit operator ReadOnlyRows(ReadOnlySpan<float> data) { return new ReadOnlyRows(data, 0, 0); }
        /// <summary>Contiguous rows.</summary>
        public static implicit operator ReadOnlyRows(ReadOnlySpan<Float16> data) { return new ReadOnlyRows(data, 0, 0); }
        /// <summary>Contiguous rows.</summary>
        public static implicit operator ReadOnlyRows(ReadOnlySpan<BFloat16> data) { return new ReadOnlyRows(data, 0, 0); }
        /// <summary>Contiguous rows.</summary>
        public static implicit operator ReadOnlyRows(float[] data) { return (ReadOnlySpan<float>)data; }
        /// <summary>Contiguous rows.</summary>
        public static implicit operator ReadOnlyRows(Float16[] data) { return (ReadOnlySpan<Float16>)data; }
        /// <summary>Contiguous rows.</summary>
        public static implicit operator ReadOnlyRows(BFloat16[] data) { return (ReadOnlySpan<BFloat16>)data; }
        /// <summary>Contiguous rows.</summary>
        public static implicit operator ReadOnlyRows(Span<float> data) { return (ReadOnlySpan<float>)data; }
        /// <summary>Contiguous rows.</summary>
        public static implicit operator ReadOnlyRows(Span<Float16> data) { return (ReadOnlySpan<Float16>)data; }
        /// <summary>Contiguous rows.</summary>
        public static implicit operator ReadOnlyRows(Span<BFloat16> data) { return (ReadOnlySpan<BFloat16>)data; }
        /// <summary>The same rows, to be read.</summary>
        public static implicit operator ReadOnlyRows(Rows rows) { return rows.Read; }

        internal unsafe akv_rows At(byte* data)
        {
            return new akv_rows { data = data, stride_row = StrideRow, stride_head = StrideHead, dtype = (int)Type };
        }

        /// <summary>Throws unless there are [n][heads][dim] elements. Strides that the library refuses may pass.</summary>
        internal void Check(string name, long n, long heads, long dim)
        {
            if (n <= 0 || heads <= 0 || dim <= 0) return;
            long size = Type == DType.F32 ? 4 : 2;
            long head = StrideHead != 0 ? StrideHead : dim * size, row = StrideRow != 0 ? StrideRow : heads * dim * size;
            if (row < 0 || head < 0 || row > long.MaxValue / 2 / n || head > long.MaxValue / 4 / heads)
                throw new ArgumentException("has strides of " + row + " and " + head + " bytes", name);
            long need = (n - 1) * row + (heads - 1) * head + dim * size;
            if (need > Data.Length) throw Library.Short(name, Data.Length / size, need / size);
        }
    }

    /// <summary>The same as ReadOnlyRows, to be written.</summary>
    public readonly ref struct Rows
    {
        internal readonly ReadOnlyRows Read;

        Rows(ReadOnlyRows rows) { Read = rows; }

        /// <summary>Rows with strides in elements, from a row and from a head to the next; 0 = contiguous.</summary>
        public Rows(Span<float> data, long strideRow, long strideHead) : this(new ReadOnlyRows(data, strideRow, strideHead)) { }
        /// <summary>Rows with strides in elements, from a row and from a head to the next; 0 = contiguous.</summary>
        public Rows(Span<Float16> data, long strideRow, long strideHead) : this(new ReadOnlyRows(data, strideRow, strideHead)) { }
        /// <summary>Rows with strides in elements, from a row and from a head to the next; 0 = contiguous.</summary>
        public Rows(Span<BFloat16> data, long strideRow, long strideHead) : this(new ReadOnlyRows(data, strideRow, strideHead)) { }

        /// <summary>Contiguous rows.</summary>
        public static implicit operator Rows(Span<float> data) { return new Rows(data, 0, 0); }
        /// <summary>Contiguous rows.</summary>
        public static implicit operator Rows(Span<Float16> data) { return new Rows(data, 0, 0); }
        /// <summary>Contiguous rows.</summary>
        public static implicit operator Rows(Span<BFloat16> data) { return new Rows(data, 0, 0); }
        /// <summary>Contiguous rows.</summary>
        public static implicit operator Rows(float[] data) { return new Rows((Span<float>)data, 0, 0); }
        /// <summary>Contiguous rows.</summary>
        public static implicit operator Rows(Float16[] data) { return new Rows((Span<Float16>)data, 0, 0); }
        /// <summary>Contiguous rows.</summary>
        public static implicit operator Rows(BFloat16[] data) { return new Rows((Span<BFloat16>)data, 0, 0); }
    }

    [StructLayout(LayoutKind.Explicit)]
    struct FloatBits
    {
        [FieldOffset(0)] public float Value;
        [FieldOffset(0)] public uint Bits;

        public static uint Of(float x) { return new FloatBits { Value = x }.Bits; }
        public static float From(uint bits) { return new FloatBits { Bits = bits }.Value; }
    }

    /// <summary>IEEE binary16.</summary>
    public readonly struct Float16
    {
        /// <summary>Its bits.</summary>
        public readonly ushort Bits;

        /// <summary>The number with these bits.</summary>
        public Float16(ushort bits) { Bits = bits; }

        /// <summary>To the nearest, ties to even. Magnitudes of 65520 and above become infinite.</summary>
        public static explicit operator Float16(float x)
        {
            uint bits = FloatBits.Of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
            if (magnitude > 0x7f800000) return new Float16((ushort)(sign | 0x7e00 | magnitude >> 13 & 0x3ff)); // NaN: quiet
            if (magnitude >= 0x47800000) return new Float16((ushort)(sign | 0x7c00)); // 65536 and above
            if (magnitude >= 0x38800000) // the exponent is 112 lower, 13 bits go; rounding may carry, up to infinity
                return new Float16((ushort)(sign | (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13));
            // Subnormal: the unit of the last place is 2^-24, which adding 1/2 leaves as the last bit.
            return new Float16((ushort)(sign | FloatBits.Of(FloatBits.From(magnitude) + 0.5f) - 0x3f000000));
        }

        /// <summary>The same value, exactly.</summary>
        public static implicit operator float(Float16 x)
        {
            uint sign = (uint)(x.Bits & 0x8000) << 16, magnitude = (uint)(x.Bits & 0x7fff);
            if (magnitude >= 0x7c00) return FloatBits.From(sign | 0x7f800000 | magnitude << 13 & 0x7fffff);
            if (magnitude >= 0x400) return FloatBits.From(sign | ((magnitude << 13) + (112u << 23)));
            return FloatBits.From(sign | FloatBits.Of((float)magnitude / (1 << 24)));
        }

        /// <summary>The value as a text.</summary>
        public override string ToString() { return ((float)this).ToString(); }
    }

    /// <summary>bfloat16: the upper half of a binary32.</summary>
    public readonly struct BFloat16
    {
        /// <summary>Its bits.</summary>
        public readonly ushort Bits;

        /// <summary>The number with these bits.</summary>
        public BFloat16(ushort bits) { Bits = bits; }

        /// <summary>To the nearest, ties to even.</summary>
        public static explicit operator BFloat16(float x)
        {
            uint bits = FloatBits.Of(x);
            if ((bits & 0x7fffffff) > 0x7f800000) return new BFloat16((ushort)(bits >> 16 | 0x40)); // a NaN stays one
            return new BFloat16((ushort)(bits + 0x7fff + (bits >> 16 & 1) >> 16));
        }

        /// <summary>The same value, exactly.</summary>
        public static implicit operator float(BFloat16 x) { return FloatBits.From((uint)x.Bits << 16); }

        /// <summary>The value as a text.</summary>
        public override string ToString() { return ((float)this).ToString(); }
    }
}
