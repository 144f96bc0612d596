// trace.c through the Go package.
package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"log"
	"os"

	"alignedkv"
)

func try(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func main() {
	data, err := os.ReadFile(os.Args[1])
	try(err)
	file := bytes.NewReader(data)
	read := func(values any) { try(binary.Read(file, binary.LittleEndian, values)) }
	var size [5]int32
	read(&size)
	qHeads, kvHeads, dim, prompt, steps := int(size[0]), int(size[1]), int(size[2]), int(size[3]), int(size[4])
	kvRow, qRow := kvHeads*dim, qHeads*dim
	k, v, q := make([]alignedkv.Float16, kvRow*(prompt+steps)), make([]alignedkv.Float16, kvRow*(prompt+steps)), make([]alignedkv.Float16, qRow*steps)
	read(k)
	read(v)
	read(q)
	out, lse, bound := make([]float32, qRow), make([]float32, qHeads), make([]float32, qHeads)

	context, err := alignedkv.NewContext(alignedkv.ContextOptions{})
	try(err)
	cache, err := context.NewCache(alignedkv.CacheOptions{Layers: []alignedkv.Layer{
		{QHeads: qHeads, KVHeads: kvHeads, DimK: dim, DTypeK: alignedkv.F16, DTypeV: alignedkv.F16}}})
	try(err)
	sequence, err := cache.NewSequence()
	try(err)
	batch, err := cache.NewBatch(alignedkv.Bounds{})
	try(err)
	hash := fnv.New64a()
	for i := -1; i < steps; i++ { // -1: the prompt, without attention
		step := alignedkv.Step{Sequences: []*alignedkv.Sequence{sequence}, New: []int32{1}, Queries: []int32{1}}
		at := kvRow * (prompt + i)
		if i < 0 {
			step.New[0], step.Queries[0], at = int32(prompt), 0, 0
		}
		try(batch.Begin(step))
		try(batch.Append(0, alignedkv.RowsOf(k[at:]), alignedkv.RowsOf(v[at:])))
		if i >= 0 {
			try(batch.Attention(0, &alignedkv.Attention{Q: alignedkv.RowsOf(q[qRow*i:]), Out: alignedkv.RowsOf(out), LSE: lse, Bound: bound}))
			for _, values := range [][]float32{out, lse, bound} {
				try(binary.Write(hash, binary.LittleEndian, values))
			}
		}
		try(batch.Commit())
	}
	try(batch.Close())
	try(sequence.Close())
	try(cache.Close())
	try(context.Close())
	fmt.Printf("%016x\n", hash.Sum64())
}
