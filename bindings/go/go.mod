module alignedkv

go 1.22
