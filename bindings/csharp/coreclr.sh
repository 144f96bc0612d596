#!/bin/sh
# The C# tests under CoreCLR, which the Python package dotnetcore2 carries (.NET Core 3.1), compiled against its assemblies.
# usage: coreclr.sh LIBRARY_FOLDER WORK
set -eu
here=$(cd "$(dirname "$0")" && pwd)
libraries=$1 work=$2
mkdir -p "$work"
cd "$work"
if [ ! -e dotnetcore2/bin/dotnet ]; then
    echo "dotnetcore2==3.1.23 --hash=sha256:5f076ddc39da0c685e7de20ecb91ee81185928918ec86fbeb3bffc55dd867ab5" >requirements.txt
    python3 -m pip download -q --no-deps --require-hashes -r requirements.txt
    python3 -m zipfile -e dotnetcore2-*.whl .
    chmod +x dotnetcore2/bin/dotnet
fi
framework=$(echo "$PWD"/dotnetcore2/bin/shared/Microsoft.NETCore.App/*)
references=
for name in System.Private.CoreLib System.Runtime System.Runtime.Extensions System.Runtime.InteropServices System.Memory \
    System.Collections System.Console System.Threading.Thread; do
    references="$references -r:$framework/$name.dll"
done
# shellcheck disable=SC2086 # a list of options
mcs -nostdlib -noconfig -sdk:none -unsafe -langversion:7.2 -warnaserror -nowarn:1591 $references -out:tests.dll \
    "$here"/src/*.cs "$here"/test/*.cs
cat >tests.runtimeconfig.json <<'END'
{"runtimeOptions": {"framework": {"name": "Microsoft.NETCore.App", "version": "3.1.0"},
                    "configProperties": {"System.Globalization.Invariant": true}}}
END
LD_LIBRARY_PATH="$libraries" dotnetcore2/bin/dotnet exec tests.dll
