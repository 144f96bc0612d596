package alignedkv

import (
	"math"
	"unsafe"
)

// DType is the type of the elements of rows.
type DType int32

// Element types.
const (
	F32  DType = akvF32
	F16  DType = akvF16
	BF16 DType = akvBf16
)

func (t DType) size() int64 {
	if t == F32 {
		return 4
	}
	return 2
}

// Element is what rows are made of.
type Element interface{ float32 | Float16 | BFloat16 }

// Rows is an array [row][head][dim] over a slice, dim contiguous. The zero value stands for no rows.
type Rows struct {
	data                  unsafe.Pointer
	bytes                 int64
	dtype                 DType
	strideRow, strideHead int64
}

// RowsOf is a slice as rows: all heads of a row, then the next row.
func RowsOf[T Element](data []T) Rows { return StridedRows(data, 0, 0) }

// StridedRows is a slice as rows whose strides count elements: from a row to the next, from a head to the next; 0 =
// contiguous.
func StridedRows[T Element](data []T, strideRow, strideHead int) Rows {
	r := Rows{data: unsafe.Pointer(unsafe.SliceData(data))}
	switch any(T(0)).(type) {
	case float32:
		r.dtype = F32
	case Float16:
		r.dtype = F16
	case BFloat16:
		r.dtype = BF16
	}
	size := r.dtype.size()
	r.bytes, r.strideRow, r.strideHead = int64(len(data))*size, int64(strideRow)*size, int64(strideHead)*size
	return r
}

func (r *Rows) raw() rows {
	return rows{data: r.data, strideRow: r.strideRow, strideHead: r.strideHead, dtype: int32(r.dtype)}
}

// fits tells whether the slice holds [n][heads][dim] elements; strides that the library refuses may pass.
func (r *Rows) fits(call, name string, n, heads, dim int64) error {
	if n <= 0 || heads <= 0 || dim <= 0 {
		return nil
	}
	size := r.dtype.size()
	row, head := r.strideRow, r.strideHead
	if head == 0 {
		head = dim * size
	}
	if row == 0 {
		row = heads * dim * size
	}
	if row < 0 || head < 0 || row > math.MaxInt64/2/n || head > math.MaxInt64/4/heads {
		return argument(call, "%s has strides of %d and %d bytes", name, row, head)
	}
	if need := (n-1)*row + (heads-1)*head + dim*size; need > r.bytes {
		return argument(call, "%s has %d elements, and [%d][%d][%d] needs %d", name, r.bytes/size, n, heads, dim, need/size)
	}
	return nil
}

// enough tells whether an optional slice has n elements.
func enough[T any](call, name string, s []T, n int64) error {
	if s != nil && int64(len(s)) < n {
		return argument(call, "%s has %d elements, expected %d", name, len(s), n)
	}
	return nil
}
