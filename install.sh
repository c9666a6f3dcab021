#!/bin/bash
# Sets up gdb-kprobe: Debian packages, a virtual environment for the Python inside gdb, and the guests to try it on.
set -euo pipefail

usage() {
    cat <<'END'
usage: ./install.sh [COMMAND]

  (none)        set up; a second run only looks whether everything is there
  demo          set up, then show on a live Debian guest what kprobes do and what a hit costs, beside a gdb breakpoint
  test          set up, then run everything that CI runs: half an hour or more on two idle cores
  torture KIND  set up, then prove on guests of its own that probes are safe; --help names the kinds
  bench         set up, then measure what a hit costs, and what arming all functions does; --only REGEX chooses rows
  matrix        set up, then run cells of userland, kernel, accelerator and kind of guest, which take a minute each;
                --list names them, --only REGEX chooses, --full does all in each that a cell can do, --markdown FILE
                writes the table; other releases of Debian are made in chroots, which needs root and debootstrap
  reference     set up, then make the pages of docs/reference/ that are made of the docstrings
  --uninstall   remove the virtual environment, the cache and what builds and tests left here
  --help        this text

Needs Debian 12 or later. Installs Debian packages only when run as root; else it prints the command to run.
END
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache="${XDG_CACHE_HOME:-$HOME/.cache}/gdb-kprobe"
venv="$here/.venv"

packages=(
    gdb                 # with Python inside
    qemu-system-x86     # runs the guests
    busybox-static      # the guest's user land
    binutils            # assembles the workload program
    cpp                 # pwntools preprocesses the bare-metal guest's source with it
    kmod                # depmod, for the guest's modules
    python3-venv
    ca-certificates
)

say() { printf 'install: %s\n' "$*"; }
fail() {
    printf 'install: error: %s\n' "$*" >&2
    exit 1
}

# A Python in the user's environment must not leak into ours. pip's configuration files stay: they may name the only
# package index that can be reached from here.
unset PYTHONPATH PYTHONHOME PYTHONSTARTUP VIRTUAL_ENV PIP_TARGET PIP_PREFIX PIP_ROOT
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1

exec {told}>&1 # also for what is said while a command's output goes elsewhere

# The command stays in the foreground: bash would have it ignore SIGINT in the background, and gdb with it.
patiently() { # WHAT COMMAND...: run a command that may be silent for minutes, and say twice a minute that it is at work
    local what=$1 status=0 ticker
    shift
    tell_time "$what" &
    ticker=$!
    "$@" || status=$?
    kill "$ticker" 2>/dev/null
    wait "$ticker" 2>/dev/null || :
    return "$status"
}

tell_time() { # WHAT
    local never begin=$SECONDS
    exec {never}<> <(:) # a pipe that nobody writes to: a sleep would stay behind when this is ended
    while :; do
        read -r -t 30 -u "$never" || :
        say "$1: for $((SECONDS - begin)) s" >&"$told"
    done
}

is_installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

install_packages() { # PACKAGE...
    if [ "$(id -u)" != 0 ]; then
        printf 'install: these Debian packages are missing: %s\nRun this, then ./install.sh again:\n\n' "$*" >&2
        printf '    sudo apt-get update && sudo apt-get install -y --no-install-recommends %s\n\n' "$*" >&2
        exit 1
    fi
    say "installing Debian packages: $*"
    export DEBIAN_FRONTEND=noninteractive
    patiently "fetching Debian's package lists" apt-get update -qq || fail "apt-get update failed: is there a network?"
    patiently "installing Debian packages" \
        apt-get install -y -qq --no-install-recommends "$@" >"$cache/apt.log" 2>&1 ||
        { tail -n 20 "$cache/apt.log" >&2; fail "apt-get install failed; the whole output is in $cache/apt.log"; }
    printf '%s\n' "$@" >>"$cache/installed-packages"
}

debian_packages() {
    command -v dpkg-query >/dev/null && command -v apt-get >/dev/null ||
        fail "this is not Debian (no dpkg, no apt-get); docs/guide/installing.md has what other distributions need"
    local missing=() package
    for package in "${packages[@]}"; do
        is_installed "$package" || missing+=("$package")
    done
    [ ${#missing[@]} = 0 ] || install_packages "${missing[@]}"
    # The kernels are fetched by name: that needs package lists.
    if [ "$(id -u)" = 0 ] && ! apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1; then
        say "fetching Debian's package lists"
        patiently "fetching Debian's package lists" apt-get update -qq || fail "apt-get update failed: is there a network?"
    fi
}

# The Python of the same minor version as the one linked into gdb: the plugin's libraries are loaded there.
gdb_python() {
    local version python
    version=$(gdb -batch -nx -ex 'python import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
        fail "$(command -v gdb) does not run"
    [[ $version =~ ^3\.[0-9]+$ ]] || fail "$(command -v gdb) has no Python inside; install Debian's gdb package"
    [ "${version#3.}" -ge 11 ] || fail "gdb has Python $version inside; 3.11 or later is needed (Debian 12 has it)"
    python=/usr/bin/python$version
    [ -x "$python" ] && "$python" -c 'import venv, ensurepip' 2>/dev/null || install_packages "python$version-venv" >&2
    printf '%s\n' "$python"
}

virtual_environment() {
    local python stamp
    python=$(gdb_python)
    stamp=$(cat "$here/pyproject.toml" - <<<"$python $("$python" --version) $here" | sha256sum)
    [ -f "$venv/.stamp" ] && [ "$(cat "$venv/.stamp")" = "$stamp" ] && return
    say "making the virtual environment with $python (a minute or two)"
    rm -f "$venv/.stamp"
    [ -x "$venv/bin/python" ] && [ "$("$venv/bin/python" --version)" = "$("$python" --version)" ] ||
        "$python" -m venv --clear "$venv"
    patiently "installing Python packages" "$venv/bin/python" -m pip install --quiet --editable "$here[dev]" ||
        fail "pip could not install the Python packages; its message is above"
    printf '%s\n' "$stamp" >"$venv/.stamp"
}

set_up() {
    mkdir -p "$cache"
    debian_packages
    virtual_environment
    # Where PYTHONDONTWRITEBYTECODE is set each gdb would compile the plugin anew when it loads it.
    "$venv/bin/python" -m compileall -q "$here/gdb_kprobe" "$here/qemu"
    # Not with -m from here: the folder qemu/ must not be taken for a Python package.
    "$venv/bin/gdb-kprobe" build
    local line
    line=$("$venv/bin/gdb-kprobe" gdbinit) || fail "gdb does not load the plugin; its message is above"
    say "ready. To load the plugin into any gdb (also as a line of ~/.gdbinit):"
    printf '\n    %s\n\n' "$line"
    say "the launcher is $venv/bin/gdb-kprobe; try: ./install.sh demo"
}

# Other releases of Debian, for the matrix. Without root its cells there are skipped, and say so.
chroot_packages() {
    [ "$(id -u)" != 0 ] || is_installed debootstrap || install_packages debootstrap
}

# Runs a package of tests/ as a program. -P: where the current directory has a package tests, that is not meant.
run_module=("$venv/bin/python" -P -m)

# The cells of the matrix that each run of the tests has.
sample='^debian13/(debian/tcg/demo|6.1-cloud/kvm/2cpu)$'

failed=()
check() { # HEADING COMMAND...
    local heading=$1
    shift
    printf '\n=== %s\n' "$heading"
    "$@" || failed+=("$heading")
}

run_tests() {
    local begin=$SECONDS bin=$venv/bin
    cd "$here"
    check 'ruff check' "$bin/ruff" check .
    check 'ruff format' "$bin/ruff" format --check .
    check 'mypy' "$bin/mypy"
    check 'import layers' "$bin/lint-imports"
    # Two at a time: each has guests of its own, of up to two vCPUs. A file's tests share theirs.
    check 'tests' patiently tests "$bin/python" -m pytest --numprocesses 2 --dist loadfile --durations 40
    check 'a sample of the matrix' "${run_module[@]}" tests.matrix --only "$sample"
    local seconds=$((SECONDS - begin))
    printf '\n=== %d min %02d s\n' $((seconds / 60)) $((seconds % 60))
    [ ${#failed[@]} = 0 ] || fail "failed: $(printf '%s; ' "${failed[@]}")"
    say "all passed"
}

uninstall() {
    if [ -s "$cache/installed-packages" ]; then
        say "these Debian packages were installed for it; to remove them: apt-get remove --autoremove" \
            "$(sort -u "$cache/installed-packages" | paste -s -d ' ')"
    fi
    rm -rf "$venv" "$cache" "$here"/.{mypy,ruff,pytest,import_linter}_cache "$here"/.hypothesis
    find "$here" -name __pycache__ -type d -prune -exec rm -rf {} +
    say "removed $venv and $cache"
}

case "${1:-}" in
    '')
        set_up
        ;;
    demo)
        set_up
        exec "$venv/bin/gdb-kprobe" demo "${@:2}"
        ;;
    test)
        set_up
        chroot_packages
        run_tests
        ;;
    matrix)
        set_up
        chroot_packages
        exec "${run_module[@]}" tests.matrix "${@:2}"
        ;;
    torture | bench | reference)
        set_up
        exec "${run_module[@]}" "tests.$1" "${@:2}"
        ;;
    --uninstall)
        uninstall
        ;;
    --help | -h)
        usage
        ;;
    *)
        usage >&2
        exit 2
        ;;
esac
