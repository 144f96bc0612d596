package alignedkv

import (
	"runtime"
	"sync/atomic"
	"unsafe"
)

// Bounds limits the steps of a batch, so that their memory is known beforehand. Zero = no bound.
type Bounds struct {
	Sequences int
	Queries   int   // Sum over the sequences.
	KV        int64 // Tokens of a sequence after a step.
	Threads   int
}

// Step is one model step over some sequences.
type Step struct {
	Sequences []*Sequence // Each at most once.
	New       []int32     // Tokens that are appended to each; nil = none.
	Queries   []int32     // Query rows of each: its last tokens, new or not; nil = as New.
	Positions []int64     // Of the new tokens, sequence by sequence; nil = consecutive.
}

// Batch carries one model step at a time through all layers. Begin, Commit, Abort and Close exclude other calls; in
// between, Attention may run any number of times at once.
type Batch struct {
	handle atomic.Uintptr
	cache  *Cache
	step   atomic.Pointer[counts]
}

// counts of the step in progress; it keeps the sequences alive.
type counts struct {
	new, queries int64
	sequences    []*Sequence
}

// NewBatch makes a batch.
func (c *Cache) NewBatch(b Bounds) (*Batch, error) {
	d := batchDesc{structSize: uint32(unsafe.Sizeof(batchDesc{})), maxSequences: clamp(b.Sequences), maxQ: clamp(b.Queries),
		maxKv: b.KV, maxThreads: clamp(b.Threads)}
	var p uintptr
	err := callBatchCreate(c.handle.Load(), &d, &p)
	runtime.KeepAlive(c)
	if err != nil {
		return nil, err
	}
	batch := &Batch{cache: c}
	batch.handle.Store(p)
	runtime.SetFinalizer(batch, func(b *Batch) { _ = b.Close() })
	return batch, nil
}

// Close destroys the batch; a step in progress is aborted. ErrBusy while calls are in it.
func (b *Batch) Close() error {
	if err := destroy(&b.handle, "akv_batch_destroy", "the batch", callBatchDestroy); err != nil {
		return err
	}
	b.step.Store(nil)
	runtime.SetFinalizer(b, nil)
	return nil
}

func sum(call, name string, counts []int32, n int) (total int64, err error) {
	if err := enough(call, name, counts, int64(n)); err != nil || counts == nil {
		return 0, err
	}
	for _, c := range counts[:n] {
		total += int64(c)
	}
	return total, nil
}

// Begin begins a step: it reserves the pages that the new tokens need in all layers, or fails as a whole. Until Commit
// or Abort nothing fails for capacity.
func (b *Batch) Begin(step Step) error {
	const call = "akv_batch_begin"
	n := len(step.Sequences)
	d := batchDesc{structSize: uint32(unsafe.Sizeof(batchDesc{})), nSequences: uint32(n)}
	next := &counts{sequences: append([]*Sequence(nil), step.Sequences...)}
	var err error
	if next.new, err = sum(call, "New", step.New, n); err != nil {
		return err
	}
	if next.queries, err = sum(call, "Queries", step.Queries, n); err != nil {
		return err
	}
	if step.Queries == nil {
		next.queries = next.new
	}
	if err := enough(call, "Positions", step.Positions, next.new); err != nil {
		return err
	}
	ids := make([]uint64, n)
	for i, s := range step.Sequences {
		if s == nil || s.cache != b.cache {
			return &Error{Status: ErrHandle, Call: call, Text: "a sequence is nil, or of another cache"}
		}
		ids[i] = s.id.Load()
	}
	d.sequences, d.nNew, d.nQ, d.positions = pin(nil, ids), pin(nil, step.New), pin(nil, step.Queries), pin(nil, step.Positions)
	if err := callBatchBegin(b.handle.Load(), &d, 0); err != nil {
		return err
	}
	b.step.Store(next)
	runtime.KeepAlive(b)
	return nil
}

// Commit ends a step: its tokens are part of their sequences. If Append is missing for a layer, the step goes on.
func (b *Batch) Commit() error { return b.end(callBatchCommit) }

// Abort ends a step as if it had not begun. Without one it does nothing.
func (b *Batch) Abort() error { return b.end(callBatchAbort) }

func (b *Batch) end(call func(uintptr) error) error {
	if err := call(b.handle.Load()); err != nil {
		return err
	}
	b.step.Store(nil)
	runtime.KeepAlive(b)
	return nil
}

// progress is the step that has begun, if any.
func (b *Batch) progress() counts {
	if step := b.step.Load(); step != nil {
		return *step
	}
	return counts{}
}

// Append appends the new tokens' rows in one layer, sequence by sequence: K after RoPE, both in the layer's element
// types. Once per layer and step.
func (b *Batch) Append(layer int, key, value Rows) error {
	if err := b.cache.checkKV("akv_quantize_kv", layer, b.progress().new, &key, &value); err != nil {
		return err
	}
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	s.key, s.value = key.raw(), value.raw()
	err := callQuantizeKv(b.handle.Load(), clamp(layer), &s.key, &s.value, 0)
	runtime.KeepAlive(b)
	return err
}
