package alignedkv

import "math"

// Float16 is IEEE binary16, as bits.
type Float16 uint16

// BFloat16 is the upper half of a binary32, as bits.
type BFloat16 uint16

// ToFloat16 rounds to the nearest, ties to even. Magnitudes of 65520 and above become infinite.
func ToFloat16(x float32) Float16 {
	bits := math.Float32bits(x)
	sign, magnitude := Float16(bits>>16&0x8000), bits&0x7fffffff
	switch {
	case magnitude > 0x7f800000: // NaN: quiet, with the upper bits of its payload.
		return sign | 0x7e00 | Float16(magnitude>>13&0x3ff)
	case magnitude >= 0x47800000: // 65536 and above.
		return sign | 0x7c00
	case magnitude >= 0x38800000: // Normal: the exponent is 112 lower, 13 bits go; rounding may carry, up to infinity.
		return sign | Float16((magnitude-112<<23+0xfff+(magnitude>>13&1))>>13)
	default: // Subnormal: the unit of the last place is 2^-24, which adding 1/2 leaves as the last bit.
		return sign | Float16(math.Float32bits(math.Float32frombits(magnitude)+0.5)-0x3f000000)
	}
}

// Float32 is the same value, exactly.
func (h Float16) Float32() float32 {
	sign, magnitude := uint32(h&0x8000)<<16, uint32(h&0x7fff)
	switch {
	case magnitude >= 0x7c00:
		return math.Float32frombits(sign | 0x7f800000 | magnitude<<13&0x7fffff)
	case magnitude >= 0x400:
		return math.Float32frombits(sign | (magnitude<<13 + 112<<23))
	default:
		return math.Float32frombits(sign | math.Float32bits(float32(magnitude)/(1<<24)))
	}
}

// ToBFloat16 rounds to the nearest, ties to even.
func ToBFloat16(x float32) BFloat16 {
	bits := math.Float32bits(x)
	if bits&0x7fffffff > 0x7f800000 {
		return BFloat16(bits>>16 | 0x40) // A NaN stays one.
	}
	return BFloat16((bits + 0x7fff + bits>>16&1) >> 16)
}

// Float32 is the same value, exactly.
func (b BFloat16) Float32() float32 { return math.Float32frombits(uint32(b) << 16) }
