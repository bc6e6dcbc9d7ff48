#!/bin/sh
# Download a model into the cache that all containers share; run it on the machine that has the Docker engine.
#
#   services/llama-cpp/download-model.sh                    Qwen3-VL 30B in 4 bits, with its vision projector
#   services/llama-cpp/download-model.sh REPO [FILE ...]    files of another repository, by name or pattern
#
# What is there already is not downloaded again, and an interrupted download goes on where it stopped.
#
# HF_TOKEN         for gated and private repositories
# HF_ENDPOINT      another hub than huggingface.co
# HF_CACHE_VOLUME  the volume of the cache (hf-cache)
# LLAMA_CPP_IMAGE  the image that has the downloader (orchestrator/llama-cpp:cuda12.8)
# PUID, PGID       whose the files are (1000:1000)
set -eu

image=${LLAMA_CPP_IMAGE:-orchestrator/llama-cpp:cuda12.8}
volume=${HF_CACHE_VOLUME:-hf-cache}

fail() {
    echo "download-model.sh: $1" >&2
    exit 1
}

case "${1:-}" in
-h | --help)
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0" | sed '$d'
    exit
    ;;
'') set -- Qwen/Qwen3-VL-30B-A3B-Instruct-GGUF qwen3-vl-30b-a3b-instruct-q4_k_m.gguf ;;
esac

command -v docker >/dev/null || fail "there is no docker command; run this where the Docker engine is"
docker version >/dev/null 2>&1 || fail "the Docker engine does not answer; is it running, and may you use it?"
docker image inspect "$image" >/dev/null 2>&1 ||
    fail "there is no image $image; build it with: docker build -t $image $(dirname "$0")"

if [ -t 1 ] && [ -t 2 ]; then terminal=--tty; else terminal=; fi

# Variables by name alone: their values are then in no command line, and the container is gone when this ends.
# shellcheck disable=SC2086
exec docker run --rm --init $terminal \
    --env HF_TOKEN --env HF_ENDPOINT --env PUID --env PGID \
    --volume "$volume:/data/.huggingface" \
    --cap-drop ALL --cap-add CHOWN --cap-add DAC_OVERRIDE --cap-add FOWNER \
    --cap-add KILL --cap-add SETGID --cap-add SETUID --security-opt no-new-privileges \
    "$image" download "$@"
