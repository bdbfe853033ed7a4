# Sourced by the other scripts: makes or reuses .venv and installs radixkv with the given extra into it.
# Versions come from constraints.txt (torch's CPU build). Nothing is done when nothing has changed.
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

stamp="$venv/.radixkv-$extra"
wanted=$(cat pyproject.toml constraints.txt | cksum)
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
  echo "Installing radixkv[$extra] (the first time this takes a few minutes) ..."
  pip install --quiet --disable-pip-version-check --constraint constraints.txt "setuptools>=77" wheel
  # torch first and by its exact version: asked for through radixkv alone it could be the build with CUDA
  pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
  pip install --quiet --disable-pip-version-check --no-build-isolation --constraint constraints.txt --editable ".[$extra]"
  echo "$wanted" > "$stamp"
fi
