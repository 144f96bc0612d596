module alignedkv

go 1.24
