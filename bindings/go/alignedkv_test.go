package alignedkv

import (
	"bytes"
	"errors"
	"io"
	"math"
	"math/rand"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

const (
	qHeads, kvHeads, dim = 6, 2, 32
)

func must[T any](v T, err error) func(t testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// fails tells that a call failed with a status, and a text that names a word.
func fails(t *testing.T, err error, status Status, word string) {
	t.Helper()
	var e *Error
	if !errors.Is(err, status) || !errors.As(err, &e) || e.Status != status || !strings.Contains(err.Error(), word) {
		t.Errorf("got %v, expected %v and %q", err, status, word)
	}
}

func normal(r *rand.Rand, n int) []float32 {
	x := make([]float32, n)
	for i := range x {
		x[i] = float32(r.NormFloat64())
	}
	return x
}

func open(t testing.TB, o CacheOptions) (*Context, *Cache) {
	t.Helper()
	context := must(NewContext(ContextOptions{}))(t)
	if o.Layers == nil {
		o.Layers = []Layer{{QHeads: qHeads, KVHeads: kvHeads, DimK: dim}}
	}
	cache := must(context.NewCache(o))(t)
	t.Cleanup(func() { _ = cache.Close(); _ = context.Close() })
	return context, cache
}

// step appends rows to one sequence, and attends the last queries of them.
func step(b *Batch, s *Sequence, n, queries int, key, value Rows, a *Attention) error {
	if err := b.Begin(Step{Sequences: []*Sequence{s}, New: []int32{int32(n)}, Queries: []int32{int32(queries)}}); err != nil {
		return err
	}
	err := b.Append(0, key, value)
	if err == nil && a != nil {
		err = b.Attention(0, a)
	}
	if err != nil {
		return errors.Join(err, b.Abort())
	}
	return b.Commit()
}

// truth is attention of one query row in float64 over the first n rows.
func truth(q, k, v []float32, n, head int) []float64 {
	kv := head / (qHeads / kvHeads)
	score, top := make([]float64, n), math.Inf(-1)
	for i := range score {
		for c := range dim {
			score[i] += float64(q[head*dim+c]) * float64(k[(i*kvHeads+kv)*dim+c])
		}
		score[i] /= math.Sqrt(dim)
		top = max(top, score[i])
	}
	out, total := make([]float64, dim), 0.0
	for i := range score {
		p := math.Exp(score[i] - top)
		total += p
		for c := range dim {
			out[c] += p * float64(v[(i*kvHeads+kv)*dim+c])
		}
	}
	for c := range out {
		out[c] /= total
	}
	return out
}

func TestAttentionIsWithinItsBound(t *testing.T) {
	r := rand.New(rand.NewSource(1))
	for _, mode := range []Mode{Expected, Guaranteed, Exact} {
		for _, n := range []int{1, 127, 128, 129, 700} {
			_, cache := open(t, CacheOptions{})
			sequence, batch := must(cache.NewSequence())(t), must(cache.NewBatch(Bounds{}))(t)
			k, v, q := normal(r, n*kvHeads*dim), normal(r, n*kvHeads*dim), normal(r, qHeads*dim)
			out, lse, bound := make([]float32, qHeads*dim), make([]float32, qHeads), make([]float32, qHeads)
			var stats Stats
			a := Attention{Q: RowsOf(q), Out: RowsOf(out), Mode: mode, LSE: lse, Bound: bound, Stats: &stats}
			check(t, step(batch, sequence, n, 1, RowsOf(k), RowsOf(v), &a))
			for head := range qHeads {
				for c, x := range truth(q, k, v, n, head) {
					if off := math.Abs(x - float64(out[head*dim+c])); off > float64(bound[head]) {
						t.Fatalf("mode %d, %d tokens: head %d is off by %g, and its bound is %g", mode, n, head, off, bound[head])
					}
				}
			}
			if stats.Tokens != uint64(n*kvHeads) || stats.Backend != CPU || stats.BytesK == 0 || bound[0] > 1 {
				t.Errorf("mode %d, %d tokens: %+v, bound %g", mode, n, stats, bound[0])
			}
			check(t, errors.Join(batch.Close(), sequence.Close(), cache.Close()))
		}
	}
}

func TestElementTypesAndStrides(t *testing.T) {
	r := rand.New(rand.NewSource(2))
	const n = 40
	k, v, q := normal(r, n*kvHeads*dim), normal(r, n*kvHeads*dim), normal(r, qHeads*dim)
	kh, vb := make([]Float16, len(k)), make([]BFloat16, len(v))
	for i := range k {
		kh[i], vb[i] = ToFloat16(k[i]), ToBFloat16(v[i])
		k[i], v[i] = kh[i].Float32(), vb[i].Float32()
	}
	// The same V with heads outside rows.
	turned := make([]BFloat16, len(vb))
	for i := range n {
		for h := range kvHeads {
			copy(turned[(h*n+i)*dim:][:dim], vb[(i*kvHeads+h)*dim:][:dim])
		}
	}
	var outs [3][]float32
	for i, o := range []struct {
		dtypes     [2]DType
		key, value Rows
	}{{[2]DType{F16, BF16}, RowsOf(kh), RowsOf(vb)}, {[2]DType{F16, BF16}, RowsOf(kh), StridedRows(turned, dim, n*dim)}, {[2]DType{F32, F32}, RowsOf(k), RowsOf(v)}} {
		_, cache := open(t, CacheOptions{Layers: []Layer{{QHeads: qHeads, KVHeads: kvHeads, DimK: dim, DTypeK: o.dtypes[0], DTypeV: o.dtypes[1]}}})
		sequence, batch := must(cache.NewSequence())(t), must(cache.NewBatch(Bounds{}))(t)
		outs[i] = make([]float32, qHeads*dim)
		check(t, step(batch, sequence, n, 1, o.key, o.value, &Attention{Q: RowsOf(q), Out: RowsOf(outs[i]), Mode: Exact}))
		back := make([]Float16, kvHeads*dim)
		check(t, sequence.Read(0, 1, 1, RowsOf(back), Rows{}))
		for c, x := range back { // In the exact head.
			if x != kh[kvHeads*dim+c] {
				t.Fatalf("channel %d was %v and is %v", c, kh[kvHeads*dim+c], x)
			}
		}
		if i > 0 {
			for c := range outs[i] {
				if outs[i][c] != outs[0][c] {
					t.Fatalf("case %d: the same values give another output", i)
				}
			}
		}
	}
}

func TestForkTruncateUsage(t *testing.T) {
	r := rand.New(rand.NewSource(3))
	_, cache := open(t, CacheOptions{})
	sequence, batch := must(cache.NewSequence())(t), must(cache.NewBatch(Bounds{}))(t)
	const n = 300
	rows := RowsOf(normal(r, n*kvHeads*dim))
	check(t, step(batch, sequence, n, 0, rows, rows, nil))
	fork := must(sequence.Fork(200))(t)
	check(t, fork.Truncate(150))
	u := must(cache.Usage())(t)
	if length := must(fork.Len())(t); length != 150 || u.Sequences != 2 || u.PagesShared != 1 || u.Tokens != n+150 {
		t.Errorf("%d tokens, %+v", length, u)
	}
	// A step that is aborted never happened.
	check(t, batch.Begin(Step{Sequences: []*Sequence{fork}, New: []int32{1}}))
	check(t, batch.Append(0, rows, rows))
	if in := must(fork.LayerLen(0))(t); in != 151 {
		t.Errorf("%d tokens in the step", in)
	}
	fails(t, fork.Close(), ErrBusy, "sequence")
	check(t, batch.Abort())
	if length := must(fork.Len())(t); length != 150 {
		t.Errorf("%d tokens after an abort", length)
	}
	fails(t, fork.Truncate(1000), ErrArgument, "1000")
}

func TestRemoveShiftExportImport(t *testing.T) {
	r := rand.New(rand.NewSource(4))
	_, cache := open(t, CacheOptions{})
	sequence, batch := must(cache.NewSequence())(t), must(cache.NewBatch(Bounds{}))(t)
	const n = 200
	k, v := normal(r, n*kvHeads*dim), normal(r, n*kvHeads*dim)
	check(t, step(batch, sequence, n, 0, RowsOf(k), RowsOf(v), nil))
	read := func(s *Sequence, n int64) []float32 {
		back := make([]float32, 2*n*kvHeads*dim)
		check(t, s.Read(0, 0, n, RowsOf(back[:n*kvHeads*dim]), RowsOf(back[n*kvHeads*dim:])))
		return back
	}
	same := func(what string, a, b []float32) {
		t.Helper()
		for i := range a {
			if a[i] != b[i] {
				t.Fatalf("%s: element %d is %g, and was %g", what, i, b[i], a[i])
			}
		}
	}
	before := read(sequence, n)
	inverse := make([]float32, dim/2) // No channel turns.
	var stream bytes.Buffer
	check(t, sequence.Export(&stream))
	copied := must(cache.Import(bytes.NewReader(stream.Bytes())))(t)
	same("imported", before, read(copied, n))
	damaged := bytes.Clone(stream.Bytes())
	damaged[len(damaged)/2] ^= 1
	_, err := cache.Import(bytes.NewReader(damaged))
	fails(t, err, ErrCorrupt, "")
	if _, err = cache.Import(bytes.NewReader(damaged[:100])); !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		t.Errorf("a stream that was cut short: %v", err)
	}
	broken := errors.New("no more")
	if err := sequence.Export(failing{broken}); !errors.Is(err, broken) {
		t.Errorf("a writer's error became %v", err)
	}
	if _, err := cache.Import(failing{broken}); !errors.Is(err, broken) {
		t.Errorf("a reader's error became %v", err)
	}
	if _, err := cache.Import(failing{}); err == nil {
		t.Error("a panic was lost")
	}
	var some bytes.Buffer
	if err := sequence.ExportPart(&some, Part{PlanesK: 1, PlanesV: 1}); !errors.Is(err, ErrUnsupported) {
		check(t, err)
	}
	if some.Len() >= stream.Len() {
		t.Errorf("one plane takes %d bytes, all take %d", some.Len(), stream.Len())
	}
	fails(t, sequence.ExportPart(&some, Part{FirstLayer: 7}), ErrArgument, "first_layer")
	check(t, copied.Close())
	fails(t, copied.Import(bytes.NewReader(stream.Bytes())), ErrHandle, "sequence")
	if err := sequence.Shift(0, n, 10, []Rope{{Dims: dim, InvFreq: inverse}}); !errors.Is(err, ErrUnsupported) {
		check(t, err)
		same("shifted by no angle", before[n*kvHeads*dim:], read(sequence, n)[n*kvHeads*dim:])
	}
	fails(t, sequence.Shift(0, n, 10, nil), ErrArgument, "perLayer")
	fails(t, sequence.Shift(0, n, 10, []Rope{{Dims: dim}}), ErrArgument, "InvFreq")
	if err := sequence.Remove(0, 1000); !errors.Is(err, ErrUnsupported) {
		check(t, err)
		if length := must(sequence.Len())(t); length != 0 {
			t.Errorf("%d tokens are left", length)
		}
	}
}

// failing is a reader and writer that fails, or panics without an error.
type failing struct{ err error }

func (f failing) Write([]byte) (int, error) {
	if f.err == nil {
		panic("no error")
	}
	return 0, f.err
}
func (f failing) Read([]byte) (int, error) { return f.Write(nil) }

func TestLayersComeOneByOne(t *testing.T) {
	r := rand.New(rand.NewSource(10))
	layer := Layer{QHeads: qHeads, KVHeads: kvHeads, DimK: dim}
	_, cache := open(t, CacheOptions{Layers: []Layer{layer, layer}})
	sequence, batch := must(cache.NewSequence())(t), must(cache.NewBatch(Bounds{}))(t)
	const n = 150
	check(t, batch.Begin(Step{Sequences: []*Sequence{sequence}, New: []int32{n}}))
	var parts [2]bytes.Buffer
	for i := range parts { // While the step goes on.
		check(t, batch.Append(i, RowsOf(normal(r, n*kvHeads*dim)), RowsOf(normal(r, n*kvHeads*dim))))
		check(t, sequence.ExportPart(&parts[i], Part{FirstLayer: i, Layers: 1}))
	}
	check(t, batch.Commit())
	other := must(cache.Import(&parts[0]))(t)
	check(t, other.Import(&parts[1]))
	if length := must(other.Len())(t); length != n {
		t.Errorf("%d tokens came, expected %d", length, n)
	}
	for i := range parts {
		var rows [2][]float32
		for j, s := range []*Sequence{sequence, other} {
			rows[j] = make([]float32, n*kvHeads*dim)
			check(t, s.Read(i, 0, n, Rows{}, RowsOf(rows[j])))
		}
		for c := range rows[0] {
			if rows[0][c] != rows[1][c] {
				t.Fatalf("layer %d, element %d came as %g, and was %g", i, c, rows[1][c], rows[0][c])
			}
		}
	}
}

func TestSlotsAndMasks(t *testing.T) {
	r := rand.New(rand.NewSource(5))
	const slots, n = 300, 50
	context, cache := open(t, CacheOptions{Placement: Slots, Slots: slots})
	mask := must(context.NewMask(1, slots))(t)
	k, v, q, out := normal(r, n*kvHeads*dim), normal(r, n*kvHeads*dim), normal(r, qHeads*dim), make([]float32, qHeads*dim)
	cells := make([]int64, n)
	for i := range cells {
		cells[i] = int64(100 + i)
	}
	check(t, cache.WriteSlots(0, cells, RowsOf(k), RowsOf(v)))
	shown := make([]Float16, slots)
	for i := range shown {
		shown[i] = ToFloat16(float32(math.Inf(-1)))
	}
	shown[107] = 0
	check(t, mask.Set(0, 1, slots, shown))
	a := Attention{Q: RowsOf(q), Out: RowsOf(out), Mask: mask}
	check(t, cache.SlotsAttention(0, []Span{{NQ: 1, NKV: slots}}, &a))
	for h := range qHeads {
		for c := range dim {
			if x := v[(7*kvHeads+h/(qHeads/kvHeads))*dim+c]; math.Abs(float64(out[h*dim+c]-x)) > 1e-2 {
				t.Fatalf("head %d channel %d is %g, expected %g", h, c, out[h*dim+c], x)
			}
		}
	}
	back := make([]float32, n*kvHeads*dim)
	check(t, cache.CopySlots(-1, 100, 10, n))
	check(t, cache.ReadSlots(0, 100, n, Rows{}, RowsOf(back)))
	for i := range back {
		if back[i] != v[i] {
			t.Fatalf("element %d reads back as %g, and was %g", i, back[i], v[i])
		}
	}
	check(t, cache.InvalidateSlots(0, 0, slots))
	fails(t, cache.WriteSlots(0, []int64{slots}, RowsOf(k), RowsOf(v)), ErrArgument, "slots[0]")
	fails(t, cache.WriteSlots(0, cells, RowsOf(k[1:]), RowsOf(v)), ErrArgument, "key")
	fails(t, mask.Set(0, 1, slots, shown[1:]), ErrArgument, "values")
	fails(t, cache.Attach(0, RowsOf(k), RowsOf(v)), ErrArgument, "")
	check(t, mask.Close())
	fails(t, mask.Close(), ErrHandle, "mask")
	fails(t, cache.SlotsAttention(0, []Span{{NQ: 1, NKV: slots}}, &Attention{Q: RowsOf(q), Out: RowsOf(out[1:])}), ErrArgument, "Out")
}

func TestAttachedRowsStayPinned(t *testing.T) {
	const slots = 200
	r := rand.New(rand.NewSource(6))
	_, cache := open(t, CacheOptions{Placement: Attached, Slots: slots, Layers: []Layer{{QHeads: qHeads, KVHeads: kvHeads, DimK: dim}}})
	q, out := normal(r, qHeads*dim), make([]float32, qHeads*dim)
	attach := func() []float64 {
		k, v := normal(r, slots*kvHeads*dim), normal(r, slots*kvHeads*dim)
		fails(t, cache.Attach(0, RowsOf(k[1:]), RowsOf(v)), ErrArgument, "key")
		check(t, cache.Attach(0, RowsOf(k), RowsOf(v)))
		return truth(q, k, v, slots, 0)
	}
	want := attach() // From here on only the cache knows of them.
	for range 3 {
		runtime.GC()
	}
	cells := make([]int64, slots)
	for i := range cells {
		cells[i] = int64(i)
	}
	check(t, cache.WriteSlots(0, cells, Rows{}, Rows{}))
	check(t, cache.SlotsAttention(0, []Span{{NQ: 1, NKV: slots}}, &Attention{Q: RowsOf(q), Out: RowsOf(out), Mode: Exact}))
	for c := range dim {
		if math.Abs(want[c]-float64(out[c])) > 1e-3 {
			t.Fatalf("channel %d is %g, expected %g", c, out[c], want[c])
		}
	}
}

func TestMergeStates(t *testing.T) {
	r := rand.New(rand.NewSource(7))
	context, cache := open(t, CacheOptions{})
	sequence, batch := must(cache.NewSequence())(t), must(cache.NewBatch(Bounds{}))(t)
	const n, cut = 300, 100
	k, v, q := RowsOf(normal(r, n*kvHeads*dim)), RowsOf(normal(r, n*kvHeads*dim)), RowsOf(normal(r, qHeads*dim))
	state := func() State { return State{Out: make([]float32, qHeads*dim), LSE: make([]float32, qHeads)} }
	whole, parts, merged := state(), []State{state(), state()}, state()
	call := func(s State) *Attention { return &Attention{Q: q, Out: RowsOf(s.Out), LSE: s.LSE, Mode: Exact} }
	check(t, step(batch, sequence, n, 1, k, v, call(whole)))
	check(t, batch.Begin(Step{Sequences: []*Sequence{sequence}, Queries: []int32{1}}))
	for i, s := range parts {
		a := call(s)
		if a.KVFrom = []int64{cut}; i == 0 {
			a.KVFrom, a.KVTo = nil, []int64{cut}
		}
		check(t, batch.Attention(0, a))
	}
	check(t, batch.Commit())
	check(t, context.MergeStates(parts, 1, qHeads, dim, merged))
	for i := range merged.Out {
		if math.Abs(float64(merged.Out[i]-whole.Out[i])) > 1e-5 {
			t.Fatalf("element %d is %g in parts, %g as a whole", i, merged.Out[i], whole.Out[i])
		}
	}
	fails(t, context.MergeStates(parts, 2, qHeads, dim, merged), ErrArgument, "Out")
	fails(t, context.MergeStates(nil, 1, qHeads, dim, merged), ErrArgument, "n is 0")
}

func TestErrors(t *testing.T) {
	_, err := NewContext(ContextOptions{Threads: -1})
	fails(t, err, ErrArgument, "n_threads")
	context, cache := open(t, CacheOptions{MaxBytes: 1 << 20})
	fails(t, context.Close(), ErrBusy, "")
	_, err = context.NewCache(CacheOptions{Layers: []Layer{{QHeads: 1, KVHeads: 1, DimK: 17}}})
	fails(t, err, ErrArgument, "dim_k is 17")
	_, err = context.Supports(CacheOptions{Layers: []Layer{{QHeads: 5, KVHeads: 2, DimK: 64}}}, nil)
	fails(t, err, ErrArgument, "n_q_heads")
	if path := must(context.Supports(CacheOptions{Layers: []Layer{{QHeads: 4, KVHeads: 2, DimK: 64}}}, &Attention{}))(t); path != PathProgressive|PathDense {
		t.Errorf("paths %d", path)
	}
	check(t, context.Poll())

	sequence, batch := must(cache.NewSequence())(t), must(cache.NewBatch(Bounds{}))(t)
	fails(t, cache.Close(), ErrBusy, "")
	rows := make([]float32, 100*kvHeads*dim)
	begin := Step{Sequences: []*Sequence{sequence}, New: []int32{1000000}}
	fails(t, batch.Begin(begin), ErrCapacity, "max_bytes")
	fails(t, batch.Begin(Step{Sequences: []*Sequence{sequence}, New: []int32{}}), ErrArgument, "New")
	fails(t, batch.Begin(Step{Sequences: []*Sequence{nil}}), ErrHandle, "sequence")
	fails(t, batch.Commit(), ErrArgument, "")
	begin.New[0] = 10
	check(t, batch.Begin(begin))
	fails(t, batch.Append(0, RowsOf(rows[:10*kvHeads*dim-1]), RowsOf(rows)), ErrArgument, "key")
	fails(t, batch.Append(0, RowsOf(rows), StridedRows(rows, 1<<60, 0)), ErrArgument, "value")
	fails(t, batch.Append(7, RowsOf(rows), RowsOf(rows)), ErrArgument, "layer")
	nan := append([]float32{float32(math.NaN())}, rows...)
	fails(t, batch.Append(0, RowsOf(nan), RowsOf(rows)), ErrNonfinite, "")
	check(t, batch.Append(0, RowsOf(rows), RowsOf(rows)))
	fails(t, batch.Append(0, RowsOf(rows), RowsOf(rows)), ErrArgument, "")
	out := make([]float32, 10*qHeads*dim)
	fails(t, batch.Attention(0, &Attention{Q: RowsOf(out), Out: RowsOf(out[1:])}), ErrArgument, "Out")
	fails(t, batch.Attention(0, &Attention{Q: RowsOf(rows), Out: RowsOf(out), Bound: make([]float32, 1)}), ErrArgument, "Bound")
	fails(t, batch.Attention(0, &Attention{Q: RowsOf(rows), Out: RowsOf(out), Mode: 9}), ErrArgument, "mode is 9")

	// Closing: once, and in order; what is closed answers.
	check(t, batch.Close())
	fails(t, batch.Close(), ErrHandle, "batch is closed")
	fails(t, batch.Begin(begin), ErrHandle, "batch")
	fails(t, batch.Append(0, RowsOf(rows), RowsOf(rows)), ErrHandle, "batch")
	fails(t, batch.Attention(0, &Attention{Q: RowsOf(rows), Out: RowsOf(out)}), ErrHandle, "batch")
	check(t, sequence.Close())
	fails(t, sequence.Close(), ErrHandle, "sequence is closed")
	_, err = sequence.Len()
	fails(t, err, ErrHandle, "sequence")
	check(t, cache.Close())
	fails(t, cache.Close(), ErrHandle, "cache is closed")
	_, err = cache.NewSequence()
	fails(t, err, ErrHandle, "cache")
	check(t, context.Close())
	fails(t, context.Close(), ErrHandle, "context is closed")
	_, err = context.NewCache(CacheOptions{})
	fails(t, err, ErrHandle, "context")
}

func TestStatusesAreTheLibrarys(t *testing.T) {
	for s, name := range map[Status]string{ErrArgument: "AKV_E_ARGUMENT", ErrNonfinite: "AKV_E_NONFINITE", ErrInternal: "AKV_E_INTERNAL"} {
		if s.Error() != name {
			t.Errorf("%d is %s, expected %s", s, s.Error(), name)
		}
	}
	if !strings.HasPrefix(Version(), "alignedkv ") || callAbiVersion() != akvAbiVersion {
		t.Error(Version(), callAbiVersion())
	}
}

func TestLog(t *testing.T) {
	var mutex sync.Mutex
	var lines []string
	context := must(NewContext(ContextOptions{Log: func(level LogLevel, text string) {
		mutex.Lock()
		defer mutex.Unlock()
		if lines = append(lines, text); level == LogInfo {
			panic("a log that fails")
		}
	}}))(t)
	defer context.Close()
	mutex.Lock()
	defer mutex.Unlock()
	if len(lines) == 0 || !strings.Contains(strings.Join(lines, "\n"), "cpu") {
		t.Errorf("log: %q", lines)
	}
}

func TestCollectorClosesWhatIsDropped(t *testing.T) {
	_, cache := open(t, CacheOptions{})
	func() {
		for range 100 {
			sequence, batch := must(cache.NewSequence())(t), must(cache.NewBatch(Bounds{}))(t)
			check(t, batch.Begin(Step{Sequences: []*Sequence{sequence}}))
		}
	}()
	for deadline := time.Now().Add(20 * time.Second); must(cache.Usage())(t).Sequences > 0; {
		if time.Now().After(deadline) {
			t.Fatalf("%d sequences are left", must(cache.Usage())(t).Sequences)
		}
		runtime.GC()
		time.Sleep(time.Millisecond)
	}
	check(t, cache.Close()) // No batch is left either.
}

func TestManyGoroutines(t *testing.T) {
	_, cache := open(t, CacheOptions{})
	var group sync.WaitGroup
	for g := range 8 {
		group.Add(1)
		go func() {
			defer group.Done()
			r := rand.New(rand.NewSource(int64(g)))
			sequence, batch := must(cache.NewSequence())(t), must(cache.NewBatch(Bounds{}))(t)
			out, bound := make([]float32, qHeads*dim), make([]float32, qHeads)
			k, v, q := normal(r, 200*kvHeads*dim), normal(r, 200*kvHeads*dim), normal(r, qHeads*dim)
			for n := range 200 {
				at := n * kvHeads * dim
				a := Attention{Q: RowsOf(q), Out: RowsOf(out), Bound: bound}
				if err := step(batch, sequence, 1, 1, RowsOf(k[at:]), RowsOf(v[at:]), &a); err != nil {
					t.Error(err)
					return
				}
				// Texts are the goroutine's own, whatever the others do.
				var e *Error
				if err := sequence.Truncate(int64(1000*g + 1000)); !errors.As(err, &e) || !strings.Contains(e.Text, strconv.Itoa(1000*g+1000)) {
					t.Errorf("goroutine %d got %v", g, err)
				}
			}
			for c, x := range truth(q, k, v, 200, 0) {
				if math.Abs(x-float64(out[c])) > float64(bound[0]) {
					t.Errorf("goroutine %d: channel %d is %g, expected %g", g, c, out[c], x)
				}
			}
		}()
	}
	group.Wait()
}

func TestFloats(t *testing.T) {
	for bits := range 1 << 16 {
		h, b := Float16(bits), BFloat16(bits)
		if x := h.Float32(); x == x && ToFloat16(x) != h {
			t.Fatalf("f16 %04x is %g and comes back as %04x", bits, x, ToFloat16(x))
		} else if y := ToFloat16(x).Float32(); x != x && y == y {
			t.Fatalf("f16 NaN %04x became %g", bits, y)
		}
		if x := b.Float32(); x == x && ToBFloat16(x) != b {
			t.Fatalf("bf16 %04x is %g and comes back as %04x", bits, x, ToBFloat16(x))
		} else if y := ToBFloat16(x).Float32(); x != x && y == y {
			t.Fatalf("bf16 NaN %04x became %g", bits, y)
		}
	}
	for _, c := range []struct {
		x    float32
		bits Float16
	}{{1, 0x3c00}, {-2, 0xc000}, {65504, 0x7bff}, {65519.996, 0x7bff}, {65520, 0x7c00}, {1e30, 0x7c00}, {0x1p-24, 1}, {0x1p-25, 0}, {0x1.8p-24, 2}, {0x1p-14, 0x400}} {
		if got := ToFloat16(c.x); got != c.bits {
			t.Errorf("%g is f16 %04x, expected %04x", c.x, got, c.bits)
		}
	}
	r := rand.New(rand.NewSource(9))
	for range 100000 {
		// To the nearest: no neighbour is nearer, and of two at the same distance the even one.
		x := math.Float32frombits(r.Uint32())
		if a := math.Abs(float64(x)); a != a || a >= 65504 {
			continue
		}
		got := ToFloat16(x)
		off := math.Abs(float64(got.Float32()) - float64(x))
		for _, other := range []Float16{got - 1, got + 1} {
			d := math.Abs(float64(other.Float32()) - float64(x))
			if d < off || d == off && got&1 == 1 {
				t.Fatalf("%g rounds to %g, and %g is nearer", x, got.Float32(), other.Float32())
			}
		}
	}
}
