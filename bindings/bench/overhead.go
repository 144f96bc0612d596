// The calls of overhead.c from Go, measured the same way.
package main

import (
	"fmt"
	"log"
	"time"

	"alignedkv"
)

func try(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func measure(name string, n int, call func() error) {
	best := 1e300
	for range 400 {
		start := time.Now()
		for range n {
			try(call())
		}
		best = min(best, float64(time.Since(start).Nanoseconds())/float64(n))
	}
	fmt.Printf("%s %.1f\n", name, best)
}

func main() {
	context, err := alignedkv.NewContext(alignedkv.ContextOptions{})
	try(err)
	cache, err := context.NewCache(alignedkv.CacheOptions{Layers: []alignedkv.Layer{{QHeads: 1, KVHeads: 1, DimK: 16}}})
	try(err)
	sequence, err := cache.NewSequence()
	try(err)
	batch, err := cache.NewBatch(alignedkv.Bounds{})
	try(err)

	measure("length", 2000, func() error {
		_, err := sequence.Len()
		return err
	})

	x, out := make([]float32, 16), make([]float32, 16)
	var stats alignedkv.Stats
	attention := alignedkv.Attention{Q: alignedkv.RowsOf(x), Out: alignedkv.RowsOf(out), LSE: make([]float32, 1),
		Bound: make([]float32, 1), Estimate: make([]float32, 1), Stats: &stats}
	sequences := []*alignedkv.Sequence{sequence}
	try(batch.Begin(alignedkv.Step{Sequences: sequences, New: []int32{1}}))
	try(batch.Append(0, alignedkv.RowsOf(x), alignedkv.RowsOf(x)))
	try(batch.Commit())
	attend := func() error { return batch.Attention(0, &attention) }
	try(batch.Begin(alignedkv.Step{Sequences: sequences, Queries: []int32{0}})) // No query row: what is left is the call itself.
	measure("attention", 300, attend)
	try(batch.Abort())
	try(batch.Begin(alignedkv.Step{Sequences: sequences, Queries: []int32{1}}))
	measure("attention_row", 100, attend)
	try(batch.Close())
	try(cache.Close())
	try(context.Close())
}
