#!/usr/bin/env bash
# Puts into a folder what tests/serving needs: llama.cpp's converters, and llama.cpp itself, built for CPUs. About 100 MB.
#
#     PYTHON=.venv/bin/python bash tools/get_llama_cpp.sh FOLDER
#     LLAMA_CPP=FOLDER .venv/bin/python -m pytest -m serving tests/serving
#
# Needs node 20 or newer. The converters are in the source of llama-cpp-python, which is not built.
set -euo pipefail
folder=${1:?FOLDER}
python=${PYTHON:-python3}
pip=("$python" -m pip --disable-pip-version-check --quiet)
mkdir -p "$folder"

"${pip[@]}" download --no-deps --no-binary llama-cpp-python --dest "$folder" llama-cpp-python==0.3.36
tar --extract --file "$folder"/llama_cpp_python-*.tar.gz --directory "$folder" --strip-components=2 --wildcards \
    '*/vendor/llama.cpp/convert_*.py' '*/vendor/llama.cpp/conversion/*' '*/vendor/llama.cpp/gguf-py/*'
rm "$folder"/llama_cpp_python-*.tar.gz

# The converter looks for a tokenizer.model with sentencepiece before it reads a tokenizer.json.
"${pip[@]}" install --no-deps --only-binary :all: --upgrade --target "$folder/python" sentencepiece==0.2.3 pyyaml requests
npm install --prefix "$folder" --ignore-scripts --omit=optional --no-audit --no-fund \
    node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1
