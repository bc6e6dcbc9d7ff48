#!/bin/sh
# The build stage of the Dockerfile. Its arguments come as environment variables.
#
# build.sh tools     install the compiler and what else the base lacks
# build.sh compile   get the source, check it, patch it, and put the programs into /out/bin
set -eu

vendor=/build/vendor
patches=/build/patches
source=/build/source

has_tools() {
    for tool in cmake ninja c++ curl patch; do
        command -v "$tool" >/dev/null || return 1
    done
    [ -e /usr/include/openssl/ssl.h ]
}

tools() {
    has_tools && return
    apt-get update
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates cmake curl g++ libssl-dev ninja-build patch
    rm -rf /var/lib/apt/lists/*
}

# The archive as /build/archive, checked where a checksum was given.
fetch() {
    case "$LLAMA_CPP_SOURCE" in
    http://* | https://*)
        curl --fail --location --silent --show-error --retry 3 --output /build/archive "$LLAMA_CPP_SOURCE"
        ;;
    *)
        [ -f "$vendor/$LLAMA_CPP_SOURCE" ] || fail "LLAMA_CPP_SOURCE is '$LLAMA_CPP_SOURCE': neither a URL nor a file in vendor/"
        cp "$vendor/$LLAMA_CPP_SOURCE" /build/archive
        ;;
    esac
    if [ -n "$LLAMA_CPP_SHA256" ]; then
        echo "$LLAMA_CPP_SHA256  /build/archive" | sha256sum --check --quiet -
    else
        echo "not checked, since LLAMA_CPP_SHA256 is empty: $(sha256sum /build/archive)"
    fi
}

# llama.cpp may lie deeper in the archive, as it does in source distributions of other projects.
unpack() {
    mkdir -p /build/unpacked "$source"
    tar -C /build/unpacked -xf /build/archive
    found=$(find /build/unpacked -maxdepth 5 -path '*/ggml/CMakeLists.txt' -print -quit)
    [ -n "$found" ] || fail "$LLAMA_CPP_SOURCE has no llama.cpp in it"
    mv "${found%/ggml/CMakeLists.txt}"/* "$source"
    rm -rf /build/unpacked /build/archive
}

apply_patches() {
    for patch in "$patches"/*.patch; do
        [ -e "$patch" ] || continue
        echo "applying ${patch##*/}"
        patch --directory "$source" --strip 1 --fuzz 0 --forward <"$patch"
    done
}

compile() {
    # Not for the machine that builds, but for any with AVX2. Without OpenSSL, images behind https were out of reach.
    cmake -S "$source" -B /build/made -G Ninja \
        -DCMAKE_BUILD_TYPE=Release \
        -DBUILD_SHARED_LIBS=OFF \
        -DGGML_NATIVE=OFF \
        -DGGML_CUDA="$CUDA" \
        -DCMAKE_CUDA_ARCHITECTURES="$CUDA_ARCHITECTURES" \
        -DGGML_CUDA_FA=ON \
        -DGGML_CUDA_FA_ALL_QUANTS="$CUDA_FA_ALL_QUANTS" \
        -DGGML_CUDA_NCCL=OFF \
        -DLLAMA_BUILD_NUMBER="${LLAMA_CPP_VERSION#b}" \
        -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_EXAMPLES=OFF \
        -DLLAMA_BUILD_APP=OFF \
        -DLLAMA_OPENSSL=ON \
        -DLLAMA_USE_PREBUILT_UI="$WEB_UI"
    nice ninja -C /build/made -j "${JOBS:-$(nproc)}" llama-server llama-fit-params
    mkdir -p /out/bin
    for program in llama-server llama-fit-params; do
        strip -o "/out/bin/$program" "/build/made/bin/$program"
    done
    cp "$source/LICENSE" /out/LICENSE
    rm -rf /build/made "$source"
}

fail() {
    echo "build.sh: $1" >&2
    exit 1
}

case "$1${PREBUILT:+ not}" in
tools) tools ;;
compile)
    fetch
    unpack
    apply_patches
    compile
    ;;
'compile not') mkdir -p /out && tar -C /out -xf "$vendor/$PREBUILT" ;;
esac
