//go:build !race

package alignedkv

import (
	"math/rand"
	"testing"
)

// The race detector empties pools at random.
func TestStepsDoNotAllocate(t *testing.T) {
	r := rand.New(rand.NewSource(8))
	_, cache := open(t, CacheOptions{})
	sequence, batch := must(cache.NewSequence())(t), must(cache.NewBatch(Bounds{}))(t)
	k, v, q, out, bound := normal(r, kvHeads*dim), normal(r, kvHeads*dim), normal(r, qHeads*dim), make([]float32, qHeads*dim), make([]float32, qHeads)
	var stats Stats
	a := Attention{Q: RowsOf(q), Out: RowsOf(out), Bound: bound, Stats: &stats}
	check(t, step(batch, sequence, 1, 1, RowsOf(k), RowsOf(v), &a))
	check(t, batch.Begin(Step{Sequences: []*Sequence{sequence}, Queries: []int32{1}}))
	defer batch.Close()
	if n := testing.AllocsPerRun(100, func() { check(t, batch.Attention(0, &a)) }); n > 0 {
		t.Errorf("a call of Attention allocates %g times", n)
	}
	check(t, batch.Abort())
	check(t, batch.Begin(Step{Sequences: []*Sequence{sequence}, New: []int32{0}}))
	key, value := RowsOf(k), RowsOf(v)
	if n := testing.AllocsPerRun(100, func() { check(t, batch.Append(0, key, value)) }); n > 0 {
		t.Errorf("a call of Append allocates %g times", n)
	}
}
