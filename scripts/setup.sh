# Sourced by the other scripts: makes or reuses .venv and installs radixkv with the given extra into it.
# Versions come from constraints.txt (torch's CPU build). Nothing is done when nothing has changed: an environment for
# `dev` serves `test` too, which is a part of it.
extra=$1
PYTHON=${PYTHON:-python3}
venv=.venv

if [ ! -x "$venv/bin/python" ]; then
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "radixkv needs Python 3.11 or newer; $PYTHON is $("$PYTHON" --version 2>&1). Set PYTHON=/path/to/python3.11" >&2
    exit 1
  }
  echo "Making $venv ..."
  "$PYTHON" -m venv "$venv"
fi
. "$venv/bin/activate"

wanted=$(cat pyproject.toml constraints.txt | cksum)
is_installed() { [ "$(cat "$venv/.radixkv-$1" 2>/dev/null)" = "$wanted" ]; }
if ! is_installed "$extra" && ! is_installed dev; then
  echo "Installing radixkv[$extra] (the first time this takes a few minutes) ..."
  pip install --quiet --disable-pip-version-check --constraint constraints.txt "setuptools>=77" wheel
  # torch first and by its exact version: asked for through radixkv alone it could be the build with CUDA
  pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
  pip install --quiet --disable-pip-version-check --no-build-isolation --constraint constraints.txt --editable ".[$extra]"
  echo "$wanted" > "$venv/.radixkv-$extra"
fi
