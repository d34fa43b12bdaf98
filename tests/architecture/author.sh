#!/bin/sh
# An author of a driver: the wheel with its extra `conformance` in the environment $1, the driver, its entry point and its test module in a
# folder of their own. Nothing else of the checkout can be imported.
set -eu
python=$1/bin/python
cd "$(dirname "$0")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
info=$folder/caesura_driver_example-1.0.dist-info
mkdir "$folder/caesura_testing" "$info"
cp tests/support/caesura_testing/example_driver.py "$folder/caesura_testing"
cp tests/integration/driver_author/test_example_driver.py "$folder"
printf 'Metadata-Version: 2.1\nName: caesura-driver-example\nVersion: 1.0\n' >"$info/METADATA"
printf '[caesura.drivers]\nexample = caesura_testing.example_driver:ExamplePlugin\n' >"$info/entry_points.txt"
cd "$folder"
where=$(PYTHONPATH=$folder "$python" -c 'import caesura.conformance; print(caesura.conformance.__file__)')
case "$where" in
  "$1"/*) ;;
  *) echo "the wheel is not what is tested: $where" >&2; exit 1 ;;
esac
PYTHONPATH=$folder "$python" -m pytest -q -p no:cacheprovider --rootdir "$folder" "$folder"
