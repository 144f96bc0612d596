package alignedkv

import (
	"runtime"
	"sync"
	"sync/atomic"
	"unsafe"
)

// Format is how rows are stored.
type Format int32

// Storage formats.
const (
	Aligned   Format = akvFormatAligned   // Precision-aligned digit planes under shared scales.
	Published Format = akvFormatPublished // AlignedKV as published: f16 cut into 8 | 4 | 4 bits.
	Raw       Format = akvFormatRaw       // Rows as given.
)

// Placement is who says where rows lie.
type Placement int32

// Placements.
const (
	Append   Placement = akvAppend   // The library appends rows to sequences.
	Slots    Placement = akvSlots    // The engine writes rows to cells.
	Attached Placement = akvAttached // The engine keeps its rows; the library has an index beside them.
)

// NaNPolicy is what happens with NaN and infinity in K, V or q.
type NaNPolicy int32

// What happens with NaN and infinity.
const (
	NaNError     NaNPolicy = akvNanError
	NaNPropagate NaNPolicy = akvNanPropagate
	NaNZero      NaNPolicy = akvNanZero
)

// None says "none at all" where 0 stands for a default: CacheOptions.ExactHead and ExactTail.
const None = akvNone

// Layer is the shape of one layer's attention.
type Layer struct {
	QHeads  int // A multiple of KVHeads: query head h reads KV head h / (QHeads / KVHeads).
	KVHeads int
	DimK    int // Channels of q and K: a multiple of 8 from 16 to 256 (576 if VIsPrefixOfK).
	DimV    int // Channels of V and of the output; 0 = DimK.
	DTypeK  DType
	DTypeV  DType
	PlanesK int // Digit planes that are stored: 2, 3 or 4; 0 = 4.
	PlanesV int
	Window  int // Sliding window in positions; 0 = none.
	// 0, and 1 + index of an earlier layer of the same kind whose rows this one reads (it gets no Append); 0 = its own.
	Group     int
	ShareWith int
	// V is the first DimV channels of K (MLA), and Append gets no V.
	VIsPrefixOfK bool
}

// CacheOptions is what a cache is made of.
type CacheOptions struct {
	Layers       []Layer
	Format       Format
	Placement    Placement
	NaNPolicy    NaNPolicy
	MaxSequences uint32 // Most alive at once; 0 = 65536.
	ExactHead    uint32 // First tokens whose rows are kept as given; 0 = 4, None = none.
	ExactTail    uint32 // Tokens that can be truncated as if never appended; 0 = 64, None = none.
	Streams      uint32 // Of Slots and Attached; 0 = 1.
	Slots        uint64 // Cells of a stream.
	MaxBytes     uint64 // Most bytes that the cache may take; 0 = no limit.
}

func (o *CacheOptions) raw(pins *runtime.Pinner) cacheDesc {
	layers := make([]layerDesc, len(o.Layers))
	for i, l := range o.Layers {
		layers[i] = layerDesc{
			nQHeads: clamp(l.QHeads), nKvHeads: clamp(l.KVHeads), dimK: clamp(l.DimK), dimV: clamp(l.DimV),
			dtypeK: int32(l.DTypeK), dtypeV: int32(l.DTypeV), planesK: clamp(l.PlanesK), planesV: clamp(l.PlanesV),
			window: clamp(l.Window), group: clamp(l.Group), shareWith: clamp(l.ShareWith),
		}
		if l.VIsPrefixOfK {
			layers[i].vIsPrefixOfK = 1
		}
	}
	return cacheDesc{
		structSize: uint32(unsafe.Sizeof(cacheDesc{})), format: int32(o.Format), placement: int32(o.Placement),
		nanPolicy: int32(o.NaNPolicy), nLayers: int32(len(layers)), layers: pin(pins, layers),
		maxSequences: o.MaxSequences, exactHead: o.ExactHead, exactTail: o.ExactTail, nStreams: o.Streams,
		nSlots: o.Slots, maxBytes: o.MaxBytes,
	}
}

// Cache is the KV rows of all sequences and layers.
type Cache struct {
	handle  atomic.Uintptr
	context *Context
	shapes  []shape
	cells   int64 // Of all streams.

	mutex    sync.Mutex
	attached []*runtime.Pinner // By layer: rows of the caller's that the library reads.
}

// shape of a layer's rows; V may be a part of K.
type shape struct {
	qHeads, kvHeads, dimK, dimV int64
	vIsPrefixOfK                bool
}

// NewCache makes a cache. Memory for rows is taken as sequences grow.
func (c *Context) NewCache(o CacheOptions) (*Cache, error) {
	var pins runtime.Pinner
	defer pins.Unpin()
	d := o.raw(&pins)
	var p uintptr
	err := callCacheCreate(c.handle.Load(), &d, &p)
	runtime.KeepAlive(c)
	if err != nil {
		return nil, err
	}
	cache := &Cache{context: c, cells: int64(max(o.Streams, 1)) * int64(o.Slots), attached: make([]*runtime.Pinner, len(o.Layers))}
	cache.handle.Store(p)
	for _, l := range o.Layers {
		s := shape{int64(l.QHeads), int64(l.KVHeads), int64(l.DimK), int64(l.DimV), l.VIsPrefixOfK}
		if s.dimV == 0 {
			s.dimV = s.dimK
		}
		cache.shapes = append(cache.shapes, s)
	}
	runtime.SetFinalizer(cache, func(c *Cache) { _ = c.Close() })
	return cache, nil
}

// Close destroys the cache with all its sequences. ErrBusy while batches made from it live.
func (c *Cache) Close() error {
	if err := destroy(&c.handle, "akv_cache_destroy", "the cache", callCacheDestroy); err != nil {
		return err
	}
	runtime.SetFinalizer(c, nil)
	c.mutex.Lock()
	defer c.mutex.Unlock()
	for i := range c.attached {
		c.detach(i)
	}
	return nil
}

// Usage is what a cache holds at the moment.
type Usage struct {
	Sequences     uint32
	BytesReserved uint64 // Taken: what MaxBytes limits.
	BytesUsed     uint64 // Of these: in use by sequences and batches.
	BytesKept     uint64 // Of these: rows kept as given.
	PagesUsed     uint64 // A page is 128 tokens of one layer.
	PagesFree     uint64
	PagesShared   uint64 // Held by more than one sequence.
	Tokens        uint64 // Of all sequences, shared ones counted for each.
}

// Usage reports what the cache holds.
func (c *Cache) Usage() (Usage, error) {
	u := usage{structSize: uint32(unsafe.Sizeof(usage{}))}
	err := callCacheUsage(c.handle.Load(), &u)
	runtime.KeepAlive(c)
	if err != nil {
		return Usage{}, err
	}
	return Usage{u.nSequences, u.bytesReserved, u.bytesUsed, u.bytesKept, u.pagesUsed, u.pagesFree, u.pagesShared, u.tokens}, nil
}

// shape of a layer; -1 and others that are none are the library's to refuse.
func (c *Cache) shape(layer int) shape {
	if layer < 0 || layer >= len(c.shapes) {
		return shape{}
	}
	return c.shapes[layer]
}

// checkKV tells whether K and V hold n rows of a layer.
func (c *Cache) checkKV(call string, layer int, n int64, key, value *Rows) error {
	s := c.shape(layer)
	if key != nil {
		if err := key.fits(call, "key", n, s.kvHeads, s.dimK); err != nil {
			return err
		}
	}
	if value != nil {
		return value.fits(call, "value", n, s.kvHeads, s.dimV)
	}
	return nil
}
