package alignedkv

import (
	"runtime"
	"sync"
	"unsafe"
)

// Mode is how errors of tokens add up to the tolerance.
type Mode int32

// Modes.
const (
	Expected   Mode = akvExpected   // As if independent: the rms error of a channel stays near tolerance * A.
	Guaranteed Mode = akvGuaranteed // Bounds add: Bound itself stays within tolerance * A.
	Exact      Mode = akvExact      // All stored digits are read.
)

// Visibility is which tokens a query row sees.
type Visibility int32

// Visibilities.
const (
	Causal Visibility = akvCausal // At its own position and before.
	Full   Visibility = akvFull   // All of its sequence.
)

// Attention is an attention call. Q and Out are needed: Q [queries][QHeads][DimK], Out [queries][QHeads][DimV].
type Attention struct {
	Q, Out       Rows
	Scale        float32 // Of the dot products; 0 = 1 / sqrt(DimK).
	LogitSoftcap float32 // 0 = none.
	Tolerance    float32 // Allowed error relative to A = sum of p * max|v|; 0 = 1e-3.
	Mode         Mode
	Visibility   Visibility
	Window       int       // 0 = the layer's.
	SinkTokens   int       // First tokens that a window does not hide.
	ALiBiSlopes  []float32 // [QHeads]
	SinkLogits   []float32 // [QHeads]: score of a token more, whose value is 0.
	Mask         *Mask     // Of Cache.SlotsAttention.
	KVFrom, KVTo []int64   // [queries]: only tokens KVFrom <= i < KVTo.
	Tree         []uint64  // [queries]: bits over the last 64 tokens.
	// The next five are nil or [queries][QHeads].
	LSE       []float32 // Log of the softmax's normaliser.
	Bound     []float32 // Certificate: no channel of the output is further off than this.
	LSEBound  []float32 // The same for LSE.
	Estimate  []float32 // Root mean square error of a channel that is to be expected.
	Amplitude []float32 // A: what the tolerance is relative to.
	Stats     *Stats    // Where the call's statistics go.
}

// Stats is what an attention call read and how.
type Stats struct {
	BytesK, BytesV   uint64    // Read of K and V: digits, scale bytes and exact rows.
	BytesScales      uint64    // Of both: scale bytes, and what else is stored once for a tile.
	BytesExact       uint64    // Of both: rows kept as given.
	PlanesK, PlanesV [5]uint64 // Tokens, per KV head and query row, of which 0 to 4 planes were read.
	Tokens           uint64    // Attended, summed over KV heads and query rows.
	DenseRows        uint64    // Query rows that took the dense path.
	Backend          Backend
	ISA              ISA
	Path             Path
	_                int32
}

// Stats is written by the library where it lies.
var _ [unsafe.Sizeof(stats{})]struct{} = [unsafe.Sizeof(Stats{})]struct{}{}

func (a *Attention) check(call string, s shape, queries int64) error {
	if err := a.Q.fits(call, "Q", queries, s.qHeads, s.dimK); err != nil {
		return err
	}
	if err := a.Out.fits(call, "Out", queries, s.qHeads, s.dimV); err != nil {
		return err
	}
	n := queries * s.qHeads
	switch {
	case short(a.LSE, n):
		return enough(call, "LSE", a.LSE, n)
	case short(a.Bound, n):
		return enough(call, "Bound", a.Bound, n)
	case short(a.LSEBound, n):
		return enough(call, "LSEBound", a.LSEBound, n)
	case short(a.Estimate, n):
		return enough(call, "Estimate", a.Estimate, n)
	case short(a.Amplitude, n):
		return enough(call, "Amplitude", a.Amplitude, n)
	case short(a.ALiBiSlopes, s.qHeads):
		return enough(call, "ALiBiSlopes", a.ALiBiSlopes, s.qHeads)
	case short(a.SinkLogits, s.qHeads):
		return enough(call, "SinkLogits", a.SinkLogits, s.qHeads)
	case short(a.KVFrom, queries):
		return enough(call, "KVFrom", a.KVFrom, queries)
	case short(a.KVTo, queries):
		return enough(call, "KVTo", a.KVTo, queries)
	case short(a.Tree, queries):
		return enough(call, "Tree", a.Tree, queries)
	}
	return nil
}

func short[T any](s []T, n int64) bool { return s != nil && int64(len(s)) < n }

// raw needs pins where a call is none of every step.
func (a *Attention) raw(d *attentionDesc, pins *runtime.Pinner) {
	*d = attentionDesc{
		structSize: uint32(unsafe.Sizeof(attentionDesc{})), q: a.Q.raw(), out: a.Out.raw(), scale: a.Scale,
		logitSoftcap: a.LogitSoftcap, tolerance: a.Tolerance, mode: int32(a.Mode), visibility: int32(a.Visibility),
		window: clamp(a.Window), sinkTokens: clamp(a.SinkTokens), alibiSlopes: pin(pins, a.ALiBiSlopes), sinkLogits: pin(pins, a.SinkLogits),
		kvFrom: pin(pins, a.KVFrom), kvTo: pin(pins, a.KVTo), tree: pin(pins, a.Tree), lse: pin(pins, a.LSE),
		bound: pin(pins, a.Bound), lseBound: pin(pins, a.LSEBound), estimate: pin(pins, a.Estimate),
		amplitude: pin(pins, a.Amplitude),
	}
	if a.Stats != nil {
		d.stats = (*stats)(unsafe.Pointer(a.Stats))
	}
	if a.Mask != nil {
		d.mask = a.Mask.handle.Load()
	}
}

// What is handed to C lies on the heap: steps use it again.
type scratch struct {
	desc       attentionDesc
	key, value rows
}

var scratches = sync.Pool{New: func() any { return new(scratch) }}

// Attention computes attention of the step's query rows over their sequences' rows in one layer.
func (b *Batch) Attention(layer int, a *Attention) error {
	if err := a.check("akv_aligned_attention", b.cache.shape(layer), b.progress().queries); err != nil {
		return err
	}
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	a.raw(&s.desc, nil)
	err := callAlignedAttention(b.handle.Load(), clamp(layer), &s.desc)
	runtime.KeepAlive(b)
	runtime.KeepAlive(a)
	return err
}
