package alignedkv

import (
	"runtime"
	"runtime/cgo"
	"sync/atomic"
	"unsafe"
)

// Backend is what computes.
type Backend int32

// Backends; 0 stands for CPU.
const (
	CPU  Backend = akvCpu
	CUDA Backend = akvCuda
)

// ISA is an instruction set.
type ISA int32

// Instruction sets; 0 stands for the best of the machine.
const (
	ISAScalar ISA = akvIsaScalar
	ISAAVX2   ISA = akvIsaAvx2
	ISAAVX512 ISA = akvIsaAvx512
)

// Path is a sum of the ways that attention can take.
type Path int32

// Ways that attention can take.
const (
	PathProgressive Path = akvPathProgressive
	PathDense       Path = akvPathDense
	PathPublished   Path = akvPathPublished
)

// LogLevel tells lines of the log apart.
type LogLevel int32

// Levels of the log.
const (
	LogWarn LogLevel = akvLogWarn
	LogInfo LogLevel = akvLogInfo
)

// ContextOptions is what a context is made of. Zero: the CPU, its best instruction set, no threads, no log.
type ContextOptions struct {
	Backend Backend
	Device  int // CUDA device ordinal.
	ISA     ISA
	Threads int // That attention may use, the calling one included.
	// Log receives a line of text. It is called on any thread, and must not call the library.
	Log func(level LogLevel, text string)
}

// Context is a backend and its threads. Everything else is made from one.
type Context struct {
	handle atomic.Uintptr
	log    cgo.Handle
}

// NewContext makes a context.
func NewContext(o ContextOptions) (*Context, error) {
	d := contextDesc{
		structSize: uint32(unsafe.Sizeof(contextDesc{})),
		abiVersion: akvAbiVersion,
		backend:    int32(o.Backend),
		device:     int32(o.Device),
		isa:        int32(o.ISA),
		nThreads:   clamp(o.Threads),
	}
	c := &Context{}
	if o.Log != nil {
		c.log = cgo.NewHandle(o.Log)
		d.log, d.logUser = logFunction(), uintptr(c.log)
	}
	var p uintptr
	if err := callContextCreate(&d, &p); err != nil {
		c.forget()
		return nil, err
	}
	c.handle.Store(p)
	runtime.SetFinalizer(c, func(c *Context) { _ = c.Close() })
	return c, nil
}

func (c *Context) forget() {
	if c.log != 0 {
		c.log.Delete()
		c.log = 0
	}
}

// Close destroys the context. ErrBusy while caches and masks made from it live.
func (c *Context) Close() error {
	if err := destroy(&c.handle, "akv_context_destroy", "the context", callContextDestroy); err != nil {
		return err
	}
	c.forget()
	runtime.SetFinalizer(c, nil)
	return nil
}

// destroy empties a handle whose object could be destroyed.
func destroy(handle *atomic.Uintptr, call, what string, destroy func(uintptr) error) error {
	p := handle.Load()
	if p == 0 {
		return closed(call, what)
	}
	if err := destroy(p); err != nil {
		return err
	}
	handle.Store(0)
	return nil
}

// Supports asks whether caches of such options can be made and attended (a nil attention: with defaults), and by which
// paths. Slices of the attention need not be as long as for a call.
func (c *Context) Supports(o CacheOptions, a *Attention) (Path, error) {
	var pins runtime.Pinner
	defer pins.Unpin()
	cache := o.raw(&pins)
	var attention *attentionDesc
	if a != nil {
		attention = new(attentionDesc)
		a.raw(attention, &pins)
		attention.q.data, attention.out.data, attention.stats = nil, nil, nil
	}
	var path int32
	err := callSupports(c.handle.Load(), &cache, attention, &path)
	runtime.KeepAlive(c)
	runtime.KeepAlive(a)
	return Path(path), err
}

// Poll returns and clears the first fault of work that was launched on a device. On the CPU it is nil: there every
// fault is returned by the call itself.
func (c *Context) Poll() error {
	err := callPoll(c.handle.Load(), nil, nil, nil)
	runtime.KeepAlive(c)
	return err
}

// State is partial attention over a part of a context, as Attention writes it: Out [rows][heads][dim], the others
// [rows][heads]. Bound to Amplitude may be nil: then they are not written, or count as infinite.
type State struct {
	Out, LSE, Bound, LSEBound, Estimate, Amplitude []float32
}

func (s *State) raw(call, name string, rows, heads, dim int64, pins *runtime.Pinner) (state, error) {
	for _, part := range []struct {
		name string
		s    []float32
		n    int64
	}{{"Out", s.Out, rows * heads * dim}, {"LSE", s.LSE, rows * heads}, {"Bound", s.Bound, rows * heads},
		{"LSEBound", s.LSEBound, rows * heads}, {"Estimate", s.Estimate, rows * heads}, {"Amplitude", s.Amplitude, rows * heads}} {
		if err := enough(call, name+"."+part.name, part.s, part.n); err != nil {
			return state{}, err
		}
	}
	return state{pin(pins, s.Out), pin(pins, s.LSE), pin(pins, s.Bound), pin(pins, s.LSEBound), pin(pins, s.Estimate),
		pin(pins, s.Amplitude)}, nil
}

// MergeStates merges partial states over disjoint parts of a context into the state of the whole. The slices of out
// may be those of one of the states.
func (c *Context) MergeStates(states []State, rows, heads, dim int, out State) error {
	const call = "akv_merge_states"
	if rows < 0 || heads < 0 || dim < 0 || rows > 1<<31 || heads > 1<<15 || dim > 1<<15 {
		return argument(call, "a shape of [%d][%d][%d]", rows, heads, dim)
	}
	var pins runtime.Pinner
	defer pins.Unpin()
	raws := make([]state, len(states))
	for i := range states {
		var err error
		if raws[i], err = states[i].raw(call, "a state", int64(rows), int64(heads), int64(dim), &pins); err != nil {
			return err
		}
	}
	merged, err := out.raw(call, "out", int64(rows), int64(heads), int64(dim), &pins)
	if err != nil {
		return err
	}
	err = callMergeStates(c.handle.Load(), unsafe.SliceData(raws), int32(len(raws)), int64(rows), int32(heads), int32(dim), &merged, 0)
	runtime.KeepAlive(c)
	return err
}

// pin is the address of a slice, nil of an empty one. Without pins the call itself tells the collector.
func pin[T any](pins *runtime.Pinner, s []T) *T {
	if len(s) == 0 {
		return nil
	}
	p := unsafe.SliceData(s)
	if pins != nil {
		pins.Pin(p)
	}
	return p
}

// clamp makes an int32 of what the library will refuse anyway if it is none.
func clamp(n int) int32 { return int32(min(max(n, -1), 1<<31-1)) }
