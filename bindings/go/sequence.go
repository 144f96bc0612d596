package alignedkv

import (
	"io"
	"runtime"
	"runtime/cgo"
	"sync/atomic"
	"unsafe"
)

// Sequence is one row of tokens of a cache.
type Sequence struct {
	id    atomic.Uint64
	cache *Cache
}

func newSequence(c *Cache, id uint64) *Sequence {
	s := &Sequence{cache: c}
	s.id.Store(id)
	runtime.SetFinalizer(s, func(s *Sequence) { _ = s.Close() })
	return s
}

// NewSequence makes an empty sequence.
func (c *Cache) NewSequence() (*Sequence, error) {
	var id uint64
	err := callSequenceCreate(c.handle.Load(), &id)
	runtime.KeepAlive(c)
	if err != nil {
		return nil, err
	}
	return newSequence(c, id), nil
}

// Close destroys the sequence. Pages that forks share stay with them. ErrBusy while it is in a begun batch.
func (s *Sequence) Close() error {
	id := s.id.Load()
	if id == 0 {
		return closed("akv_sequence_destroy", "the sequence")
	}
	if err := callSequenceDestroy(s.cache.handle.Load(), id); err != nil {
		return err
	}
	s.id.Store(0)
	runtime.SetFinalizer(s, nil)
	return nil
}

// Fork makes a new sequence of the first n tokens (-1 = all): whole tiles of 128 tokens are shared.
func (s *Sequence) Fork(n int64) (*Sequence, error) {
	var id uint64
	err := callSequenceFork(s.cache.handle.Load(), s.id.Load(), n, &id)
	runtime.KeepAlive(s)
	if err != nil {
		return nil, err
	}
	return newSequence(s.cache, id), nil
}

// CopyTo makes the same sequence in another cache.
func (s *Sequence) CopyTo(c *Cache) (*Sequence, error) {
	var id uint64
	err := callSequenceCopy(s.cache.handle.Load(), s.id.Load(), c.handle.Load(), &id)
	runtime.KeepAlive(s)
	runtime.KeepAlive(c)
	if err != nil {
		return nil, err
	}
	return newSequence(c, id), nil
}

// Truncate keeps the first n tokens.
func (s *Sequence) Truncate(n int64) error {
	err := callSequenceTruncate(s.cache.handle.Load(), s.id.Load(), n)
	runtime.KeepAlive(s)
	return err
}

// Reserve takes the memory that n more tokens need, so that steps of them do not fail for want of it. Truncate, to any
// length, and Close give back what is left.
func (s *Sequence) Reserve(n int64) error {
	err := callSequenceReserve(s.cache.handle.Load(), s.id.Load(), n)
	runtime.KeepAlive(s)
	return err
}

// Len is the number of committed tokens, removed ones included.
func (s *Sequence) Len() (int64, error) { return s.LayerLen(-1) }

// LayerLen is the number of tokens in a layer; those that the step in progress has appended count.
func (s *Sequence) LayerLen(layer int) (int64, error) {
	var n int64
	err := callSequenceLength(s.cache.handle.Load(), s.id.Load(), clamp(layer), &n)
	runtime.KeepAlive(s)
	return n, err
}

// Read reads tokens first to first + n back, as attention sees them with all stored planes, in any element type. The
// zero Rows leaves K or V out.
func (s *Sequence) Read(layer int, first, n int64, key, value Rows) error {
	return s.cache.transfer("akv_dequantize_kv", layer, n, key, value, func(k, v *rows) error {
		return callDequantizeKv(s.cache.handle.Load(), s.id.Load(), clamp(layer), first, n, k, v, 0)
	})
}

// transfer checks K and V, or what of them is there, and makes a call with them.
func (c *Cache) transfer(name string, layer int, n int64, key, value Rows, call func(k, v *rows) error) error {
	raw := func(r *Rows) (*rows, *Rows) {
		if r.data == nil {
			return nil, nil
		}
		raw := r.raw()
		return &raw, r
	}
	k, checkK := raw(&key)
	v, checkV := raw(&value)
	if err := c.checkKV(name, layer, n, checkK, checkV); err != nil {
		return err
	}
	err := call(k, v)
	runtime.KeepAlive(c)
	return err
}

// Remove takes out the tokens at positions from <= p < to: no query row sees them any more. Indices and positions of the
// others stay; Len counts those that were removed, but at the end, where they are cut off.
func (s *Sequence) Remove(from, to int64) error {
	err := callSequenceRemove(s.cache.handle.Load(), s.id.Load(), from, to)
	runtime.KeepAlive(s)
	return err
}

// Pairing is which channels turn together.
type Pairing int32

// Pairings of channels.
const (
	Interleaved Pairing = akvRopeInterleaved // 2i and 2i + 1.
	Halves      Pairing = akvRopeHalves      // i and i + Dims / 2.
)

// Rope is the rotary position embedding of a layer.
type Rope struct {
	Pairing  Pairing
	Dims     int       // Channels that turn: even, at most DimK.
	FirstDim int       // First of them.
	InvFreq  []float32 // [Dims / 2] radians per position.
}

// Shift adds delta to the positions from <= p < to and turns their K accordingly; one Rope per layer.
func (s *Sequence) Shift(from, to, delta int64, perLayer []Rope) error {
	const call = "akv_sequence_shift"
	if len(perLayer) != len(s.cache.shapes) {
		return argument(call, "perLayer has %d elements, expected %d", len(perLayer), len(s.cache.shapes))
	}
	var pins runtime.Pinner
	defer pins.Unpin()
	raw := make([]rope, len(perLayer))
	for i, r := range perLayer {
		if r.Dims/2 > len(r.InvFreq) {
			return argument(call, "perLayer[%d].InvFreq has %d elements, expected %d", i, len(r.InvFreq), r.Dims/2)
		}
		raw[i] = rope{pairing: int32(r.Pairing), nDims: clamp(r.Dims), firstDim: clamp(r.FirstDim), invFreq: pin(&pins, r.InvFreq)}
	}
	err := callSequenceShift(s.cache.handle.Load(), s.id.Load(), from, to, delta, &raw[0])
	runtime.KeepAlive(s)
	return err
}

// stream carries bytes between a callback and Go's interfaces, and the error that ended it.
type stream struct {
	writer io.Writer
	reader io.Reader
	err    error
}

// Part is what of a sequence is exported. Zero: everything.
type Part struct {
	FirstLayer int
	Layers     int // 0 = all from FirstLayer on.
	// Digit planes that the importing side will have, from the first; 0 = all that are stored.
	PlanesK, PlanesV int
	// Digit planes that it has by an earlier export of the same tokens: only further ones are exported.
	KnownK, KnownV int
}

// Export writes the sequence as a byte stream with version and checksums, which Import reads. An error of w is returned.
func (s *Sequence) Export(w io.Writer) error { return s.ExportPart(w, Part{}) }

// ExportPart writes some layers, with all tokens that they have by now, or some digit planes.
func (s *Sequence) ExportPart(w io.Writer, part Part) error {
	d := exportDesc{structSize: uint32(unsafe.Sizeof(exportDesc{})), firstLayer: clamp(part.FirstLayer), nLayers: clamp(part.Layers),
		planesK: clamp(part.PlanesK), planesV: clamp(part.PlanesV), knownK: clamp(part.KnownK), knownV: clamp(part.KnownV)}
	to := &stream{writer: w}
	handle := cgo.NewHandle(to)
	defer handle.Delete()
	err := callSequenceExport(s.cache.handle.Load(), s.id.Load(), &d, writeFunction(), uintptr(handle))
	runtime.KeepAlive(s)
	if to.err != nil {
		return to.err
	}
	return err
}

// Import makes a sequence from a stream; on an error there is none. An error of r is returned. It reads no byte beyond
// the stream's end.
func (c *Cache) Import(r io.Reader) (*Sequence, error) {
	id, err := c.read(r, 0)
	if err != nil {
		return nil, err
	}
	return newSequence(c, id), nil
}

// Import adds layers that the sequence lacks, since it was made from a part of them. On an error it is as before.
func (s *Sequence) Import(r io.Reader) error {
	id := s.id.Load()
	if id == 0 {
		return closed("akv_sequence_import", "the sequence")
	}
	_, err := s.cache.read(r, id)
	runtime.KeepAlive(s)
	return err
}

func (c *Cache) read(r io.Reader, into uint64) (id uint64, err error) {
	from := &stream{reader: r}
	handle := cgo.NewHandle(from)
	defer handle.Delete()
	err = callSequenceImport(c.handle.Load(), into, readFunction(), uintptr(handle), &id)
	runtime.KeepAlive(c)
	if from.err != nil {
		err = from.err
	}
	return id, err
}
