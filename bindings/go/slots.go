package alignedkv

import (
	"runtime"
	"sync/atomic"
	"unsafe"
)

// Span is the cells that some query rows look at.
type Span struct {
	Stream int32
	NQ     int32 // Query rows.
	NKV    int64 // They look at cells 0 to NKV - 1 of the stream.
}

var _ [unsafe.Sizeof(span{})]struct{} = [unsafe.Sizeof(Span{})]struct{}{}

// WriteSlots writes rows to cells: cell c of stream s is slot s * Slots + c. The zero Rows leaves K or V out; without
// both, the attached rows of these slots have changed.
func (c *Cache) WriteSlots(layer int, slots []int64, key, value Rows) error {
	return c.transfer("akv_slots_write", layer, int64(len(slots)), key, value, func(k, v *rows) error {
		return callSlotsWrite(c.handle.Load(), clamp(layer), unsafe.SliceData(slots), int64(len(slots)), k, v, 0)
	})
}

// ReadSlots reads n slots from first on back, in any element type.
func (c *Cache) ReadSlots(layer int, first, n int64, key, value Rows) error {
	return c.transfer("akv_slots_read", layer, n, key, value, func(k, v *rows) error {
		return callSlotsRead(c.handle.Load(), clamp(layer), first, n, k, v, 0)
	})
}

// InvalidateSlots forgets n slots from first on, in a layer or (-1) in all.
func (c *Cache) InvalidateSlots(layer int, first, n int64) error {
	err := callSlotsInvalidate(c.handle.Load(), clamp(layer), first, n)
	runtime.KeepAlive(c)
	return err
}

// CopySlots copies n slots, in a layer or (-1) in all.
func (c *Cache) CopySlots(layer int, from, to, n int64) error {
	err := callSlotsCopy(c.handle.Load(), clamp(layer), from, to, n)
	runtime.KeepAlive(c)
	return err
}

// Attach names the engine's own rows of a layer, of all cells of all streams. They are pinned until others are named or
// the cache is closed.
func (c *Cache) Attach(layer int, key, value Rows) error {
	const call = "akv_attach_rows"
	if err := c.checkKV(call, layer, c.cells, &key, &value); err != nil {
		return err
	}
	pins := new(runtime.Pinner)
	k, v := key.raw(), value.raw()
	for _, data := range []unsafe.Pointer{k.data, v.data} {
		if data != nil {
			pins.Pin(data)
		}
	}
	c.mutex.Lock()
	defer c.mutex.Unlock()
	if err := callAttachRows(c.handle.Load(), clamp(layer), &k, &v); err != nil {
		pins.Unpin()
		return err
	}
	c.detach(layer)
	c.attached[layer] = pins
	return nil
}

func (c *Cache) detach(layer int) {
	if c.attached[layer] != nil {
		c.attached[layer].Unpin()
		c.attached[layer] = nil
	}
}

// SlotsAttention computes attention of query rows over cells: rows of Q and of the outputs lie span by span, and see
// what Mask lets them see.
func (c *Cache) SlotsAttention(layer int, spans []Span, a *Attention) error {
	var queries int64
	for _, s := range spans {
		queries += int64(max(s.NQ, 0))
	}
	if err := a.check("akv_slots_attention", c.shape(layer), queries); err != nil {
		return err
	}
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	a.raw(&s.desc, nil)
	err := callSlotsAttention(c.handle.Load(), clamp(layer), (*span)(unsafe.Pointer(unsafe.SliceData(spans))), int32(len(spans)), &s.desc)
	runtime.KeepAlive(c)
	runtime.KeepAlive(a)
	return err
}

// Mask says who sees which cell, once per step for all layers and caches of its context.
type Mask struct {
	handle  atomic.Uintptr
	context *Context
}

// NewMask makes a mask of up to maxRows query rows and maxKV cells. Until they are set, rows see nothing.
func (c *Context) NewMask(maxRows, maxKV int64) (*Mask, error) {
	var p uintptr
	err := callMaskCreate(c.handle.Load(), maxRows, maxKV, &p)
	runtime.KeepAlive(c)
	if err != nil {
		return nil, err
	}
	m := &Mask{context: c}
	m.handle.Store(p)
	runtime.SetFinalizer(m, func(m *Mask) { _ = m.Close() })
	return m, nil
}

// Set sets rows from values [rows][nKV] on: minus infinity hides a cell, others are added to its score.
func (m *Mask) Set(firstRow, rows, nKV int64, values []Float16) error {
	const call = "akv_mask_set"
	if rows > 0 && nKV > 0 && int64(len(values))/rows < nKV {
		return argument(call, "values has %d elements, expected %d * %d", len(values), rows, nKV)
	}
	err := callMaskSet(m.handle.Load(), firstRow, rows, nKV, unsafe.Pointer(unsafe.SliceData(values)), 0, 0)
	runtime.KeepAlive(m)
	return err
}

// Close destroys the mask. ErrBusy while calls use it.
func (m *Mask) Close() error {
	if err := destroy(&m.handle, "akv_mask_destroy", "the mask", callMaskDestroy); err != nil {
		return err
	}
	runtime.SetFinalizer(m, nil)
	return nil
}
