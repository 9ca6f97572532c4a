#!/bin/sh
# Usage: llama_cpp.sh PYTHON FOLDER WORKERS PROGRAM...
# Downloads llama.cpp (once, 77 MB) into FOLDER/source, builds the programs in FOLDER/build and prints the path of the
# first. PYTHON must have pip: the source is taken from the sdist of llama-cpp-python.
set -eu
python=$1 folder=$2 workers=$3
shift 3
release=0.3.36

for tool in cmake:cmake c++:g++; do
    command -v "${tool%:*}" >/dev/null || {
        echo "make: ${tool%:*} is missing; on Debian and Ubuntu: sudo apt-get install ${tool#*:}"
        exit 1
    }
done

# The download is renamed to `source` only when it is complete.
if [ ! -d "$folder/source" ]; then
    echo "make: downloading llama.cpp (77 MB) into $folder"
    rm -rf "$folder/unpacked"
    mkdir -p "$folder/unpacked"
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
        --dest "$folder" "llama-cpp-python==$release"
    tar -xzf "$folder/llama_cpp_python-$release.tar.gz" -C "$folder/unpacked" --strip-components=3 \
        "llama_cpp_python-$release/vendor/llama.cpp"
    mv "$folder/unpacked" "$folder/source"
fi

source=$(cd "$folder/source" && pwd)
log=$folder/build.log
echo "make: building llama.cpp (some minutes once); its output goes to $log"
if ! {
    cmake -S tests/checkpoint/llama -B "$folder/build" -DCMAKE_BUILD_TYPE=Release -DLLAMA_SOURCE="$source" &&
        cmake --build "$folder/build" --parallel "$workers" --target "$@"
} >"$log" 2>&1; then
    tail -n 5 "$log"
    echo "make: the build failed, see $log"
    exit 1
fi
echo "$folder/build/bin/$1"
