package alignedkv_test

import (
	"errors"
	"fmt"
	"log"

	"alignedkv"
)

// A layer with two query heads on one KV head: three tokens, and the attention of the last one.
func Example() {
	context, err := alignedkv.NewContext(alignedkv.ContextOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer context.Close()
	cache, err := context.NewCache(alignedkv.CacheOptions{Layers: []alignedkv.Layer{{QHeads: 2, KVHeads: 1, DimK: 16}}})
	if err != nil {
		log.Fatal(err)
	}
	defer cache.Close()
	sequence, err := cache.NewSequence()
	if err != nil {
		log.Fatal(err)
	}
	batch, err := cache.NewBatch(alignedkv.Bounds{})
	if err != nil {
		log.Fatal(err)
	}
	defer batch.Close()

	keys, values := make([]float32, 3*16), make([]float32, 3*16)
	for token := range 3 {
		values[token*16] = float32(token) // All keys are 0: all tokens count the same.
	}
	q, out, bound := make([]float32, 2*16), make([]float32, 2*16), make([]float32, 2)
	step := alignedkv.Step{Sequences: []*alignedkv.Sequence{sequence}, New: []int32{3}, Queries: []int32{1}}
	if err := batch.Begin(step); err != nil {
		log.Fatal(err)
	}
	if err := batch.Append(0, alignedkv.RowsOf(keys), alignedkv.RowsOf(values)); err != nil {
		log.Fatal(err)
	}
	call := alignedkv.Attention{Q: alignedkv.RowsOf(q), Out: alignedkv.RowsOf(out), Bound: bound}
	if err := batch.Attention(0, &call); err != nil {
		log.Fatal(err)
	}
	if err := batch.Commit(); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%.3f, off by at most 0.01: %v\n", out[0], bound[0] <= 0.01)
	// Output: 1.000, off by at most 0.01: true
}

// The status of an error says what to do, its text what was wrong.
func ExampleError() {
	context, err := alignedkv.NewContext(alignedkv.ContextOptions{})
	if err != nil {
		log.Fatal(err)
	}
	defer context.Close()
	_, err = context.NewCache(alignedkv.CacheOptions{Layers: []alignedkv.Layer{{QHeads: 3, KVHeads: 2, DimK: 64}}})
	var e *alignedkv.Error
	if errors.As(err, &e) {
		fmt.Println(errors.Is(err, alignedkv.ErrArgument), e.Call)
	}
	// Output: true akv_cache_create
}

func ExampleToFloat16() {
	h := alignedkv.ToFloat16(0.1)
	fmt.Printf("%04x is %.7f\n", uint16(h), h.Float32())
	// Output: 2e66 is 0.0999756
}
