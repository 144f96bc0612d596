// Package alignedkv keeps an LLM's KV cache as precision-aligned digit planes. Decode attention reads only the digits
// that matter, and says how far off its result can be.
//
// It is a layer over the C library libalignedkv, found by pkg-config; alignedkv.h is the reference of what the calls
// do. A step of a model goes
//
//	batch.Begin(alignedkv.Step{Sequences: sequences, New: counts})
//	for layer := range layers {
//		batch.Append(layer, keys, values)   // K after RoPE
//		batch.Attention(layer, &attention)  // sees the new tokens and all older ones
//	}
//	batch.Commit()
//
// # Memory
//
// Rows are slices of the caller's: nothing is copied, and nothing is kept beyond a call (but by Cache.Attach). Every
// call checks that its slices are as long as the shapes say. Append and Attention do not allocate.
//
// # Errors
//
// A failed call has changed nothing and returns an *Error: errors.Is(err, alignedkv.ErrCapacity) asks for its status,
// its text names the argument, its value and what was expected.
//
// # Lifetime
//
// Close what you create, in the reverse order: what others were made from is ErrBusy until they are closed. What is
// dropped without Close is closed by the collector some time later. A closed object answers with ErrHandle.
//
// # Concurrency
//
// All calls may be made from any goroutine. Nothing waits for another call: what would have to is ErrBusy, has done
// nothing, and can be tried again.
package alignedkv
