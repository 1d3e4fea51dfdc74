# For the other scripts to source: finds CPython, and keeps one virtualenv for each purpose.

# Every final release of CPython >= 3.11 that works here and can make a virtualenv, newest first:
# one path a line, one line for each minor version. A name on PATH may be a shim that only fails,
# so each candidate is run.
all_pythons() {
    _pyenv=${PYENV_ROOT:-${HOME:-/nonexistent}/.pyenv}
    _seen=" "
    for _candidate in python3.14 python3.13 python3.12 python3.11 python3 python \
        "$_pyenv"/versions/*/bin/python3; do
        "$_candidate" -c '
import sys, ensurepip, venv
version = sys.version_info
if sys.implementation.name == "cpython" and version >= (3, 11) and version[3] == "final":
    print(*version[:3], sys.executable)
' 2>/dev/null </dev/null || :
    done | sort -k 1,1nr -k 2,2nr -k 3,3nr | while read -r _major _minor _micro _path; do
        case $_seen in
        *" $_major.$_minor "*) ;;
        *)
            _seen="$_seen$_major.$_minor "
            printf '%s\n' "$_path"
            ;;
        esac
    done
}

# The first of those. Fails, with a message, if there is none.
newest_python() {
    # All lines are read, for a pipe that is closed early fails where `pipefail` is set.
    _newest=$(all_pythons | sed -n 1p)
    if [ -z "$_newest" ]; then
        echo "no CPython >= 3.11 found that can make a virtualenv" >&2
        echo "(on Debian and Ubuntu: apt install python3 python3-venv)" >&2
        return 1
    fi
    printf '%s\n' "$_newest"
}

# virtualenv PURPOSE [EXTRA]: prints the Python of the virtualenv .venv-PURPOSE-<minor version>, in
# which this package is installed, editable, with the extra. It is made by $PYTHON, or else by the
# newest Python, and made again when that, pyproject.toml, the version or the checkout's place has changed.
# To be called from the top of the checkout.
virtualenv() {
    _base=${PYTHON:-}
    if [ -z "$_base" ]; then
        _base=$(newest_python) || return 1
    fi
    _dir=.venv-$1-$("$_base" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || return 1
    _made_from=$(
        pwd
        echo "${2:-}"
        "$_base" -c 'import sys; print(sys.version, sys.executable)'
        cat pyproject.toml
        grep '^__version__' trioreactor/__init__.py
    ) || return 1
    # Written last, so that an interrupted installation is not taken for a whole one.
    if [ "$_made_from" != "$(cat "$_dir/made-from" 2>/dev/null)" ]; then
        echo "making $_dir ..." >&2
        "$_base" -m venv --clear "$_dir" >&2 || return 1
        "$_dir/bin/python" -m pip install --quiet --disable-pip-version-check \
            --editable ".${2:+[$2]}" >&2 || return 1
        printf '%s\n' "$_made_from" >"$_dir/made-from"
    fi
    printf '%s\n' "$_dir/bin/python"
}
