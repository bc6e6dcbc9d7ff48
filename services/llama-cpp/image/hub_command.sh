#!/bin/sh
# `hf` and `huggingface-cli`, by the name under which it is called.
exec /opt/hub/bin/python -E -B /opt/llama-cpp/hub_command.py "${0##*/}" "$@"
