# Sourced by scripts/demo, test and bench: brings the machine and .venv to what this clone needs.
#
# Owns: system packages (testbed/packages.txt), .venv, and where a command runs. Each command calls set_up, then run_in_lab.
# Rules that hold here:
#   * nothing is done when nothing is missing: no network, no write, about 0.1 s; what a machine cannot have although it
#     is not required is asked for once;
#   * a stamp in .venv is written last, so a .venv whose making was killed has none and is made again;
#   * a run holds a shared lock on the clone's folder for as long as it lives, set-up an exclusive one: .venv is never
#     rebuilt under a run. The lock is on the folder's descriptor, so that it leaves no file and ends with its process.

cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly VENV_PYTHON=.venv/bin/python
readonly LOCKS=(requirements-build.lock requirements.lock)

# Where nft and ip are; not everyone has it on PATH who is not root.
PATH=$PATH:/usr/sbin:/sbin

# A test run starts a thousand Pythons; with this set, each would compile all our sources anew.
unset PYTHONDONTWRITEBYTECODE

# CI logs are read as plain text, whatever the runner's terminal and environment say.
if [[ ${CI:-} == true ]]; then
    unset FORCE_COLOR CLICOLOR_FORCE MYPY_FORCE_COLOR PYTEST_ADDOPTS
    export NO_COLOR=1 PY_COLORS=0 TERM=dumb
fi

say() { printf '%s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

# set_up [tests]: all that the demo needs; with `tests`, also the programs that only tests need.
set_up() {
    exec 9<.
    flock --nonblock --shared 9 || { say 'waiting for another run to finish setting up .venv'; flock --shared 9; }
    local missing
    missing=$(missing_packages required)
    # Who may not write here does without what only tests need.
    if [[ -n $missing ]] || ! is_current packages || ! is_current project ||
        { [[ $# -gt 0 && -w .venv ]] && ! is_current "$1"; }; then
        flock --nonblock --exclusive 9 || { say 'waiting for the runs that use .venv to end'; flock --exclusive 9; }
        make_current "$@"
        flock --shared 9
    fi
}

make_current() {
    [[ -w . && (! -e .venv || -w .venv) ]] || die "$PWD: .venv must be made anew, and $(id -un) may not write here"
    # Another run may have done it all between the two locks; each step looks again.
    provide_packages "$@"
    is_current packages || build_venv
    is_current project || install_project
    [[ $# -eq 0 ]] || stamp "$1"
}

# ---- system packages ----

python_of_the_machine() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo false # a Python that can do nothing: every package that stands on it counts as missing
}

# missing_packages WHEN...: "package|what for" lines of those whose `when` is among the arguments.
missing_packages() {
    local package probe when purpose python=
    while read -r package probe when purpose; do
        [[ -z $package || $package == '#'* || " $* " != *" $when "* ]] && continue
        [[ $probe == python:* || $probe == include:* ]] && python=${python:-$(python_of_the_machine)}
        is_present "$probe" "$python" || echo "$(package_name "$package" "$python")|$purpose"
    done <testbed/packages.txt
}

is_present() {
    local name=${1#*:}
    case $1 in
        command:*) command -v "$name" >/dev/null ;;
        header:*) [[ -e /usr/include/$name ]] ;;
        python:*) "$2" -c "import $name" 2>/dev/null ;;
        include:*) [[ -e $("$2" -c 'import sysconfig; print(sysconfig.get_path("include"))')/$name ]] ;;
        *) die "testbed/packages.txt: cannot probe $1" ;;
    esac
}

# python3-dev belongs to the distribution's default Python; python3.12 has python3.12-dev.
package_name() {
    [[ $1 == python3-* && $2 == python3.* ]] && echo "$2-${1#python3-}" || echo "$1"
}

provide_packages() {
    local when=(required optional "$@") missing
    is_current packages || when+=(build)
    missing=$(missing_packages "${when[@]}")
    [[ -z $missing ]] && return
    if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        apt_install $(cut -d'|' -f1 <<<"$missing")
        missing=$(missing_packages "${when[@]}")
        [[ -z $missing ]] && return
    fi
    say 'missing on this machine:'
    sed 's/|/: /; s/^/  /' <<<"$missing" >&2
    say "as root: apt install $(cut -d'|' -f1 <<<"$missing" | paste -sd' ')"
    is_current packages && when=(required) || when=(required build)
    [[ -z $(missing_packages "${when[@]}") ]] || die 'these are needed; nothing was built'
}

apt_install() {
    local package log offered=()
    log=$(mktemp)
    apt() { DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=120 "$@" >>"$log" 2>&1; }
    # The lists of a fresh machine are empty.
    for package in "$@"; do
        is_offered "$package" || { apt update || true; break; }
    done
    for package in "$@"; do
        ! is_offered "$package" || offered+=("$package")
    done
    if [[ ${#offered[@]} -gt 0 ]]; then
        say "installing ${offered[*]}"
        [[ " ${offered[*]} " != *' squid '* ]] || squid_service mask
        # Lists may be older than the files that they name.
        apt install -y --no-install-recommends "${offered[@]}" ||
            { apt update && apt install -y --no-install-recommends "${offered[@]}"; } || tail -n 30 "$log" >&2
        [[ " ${offered[*]} " != *' squid '* ]] || squid_service unmask
    fi
    rm -f "$log"
}

# Does this distribution have a package of that name? One that it does not have keeps apt from installing the others;
# one that is only a name for another would bring what was not asked for: Ubuntu's `chromium` is snapd and a snap.
is_offered() { [[ -n $(apt-cache madison "$1" 2>/dev/null) ]]; }

# squid_service mask|unmask: Debian starts a service when it is installed, and at every boot from then on; squid is here
# to run in a node of a test. Masked before, disabled after; should this be killed between them, a reboot unmasks it.
squid_service() {
    [[ ! -d /run/systemd/system ]] || systemctl --runtime "$1" squid || true
    [[ $1 == mask ]] || update-rc.d squid disable || true
} &>/dev/null

# ---- .venv ----

# What .venv must have been made from: these files, this folder (a copied .venv points to where it came from) and this
# Python (below an unchanged .venv the machine may have moved on to the next).
fingerprint() {
    local files=("${LOCKS[@]}")
    case $1 in
        project) files+=(pyproject.toml) ;;
        tests) files+=(testbed/packages.txt) ;;
    esac
    { pwd && "$VENV_PYTHON" -I -S -c 'import sys; print(sys.version)' && cat "${files[@]}"; } 2>/dev/null | sha256sum
}

is_current() { [[ -f .venv/stamp-$1 && $(<".venv/stamp-$1") == "$(fingerprint "$1")" ]]; }
stamp() { fingerprint "$1" >".venv/stamp-$1"; }

# Twice quiet: errors only. Warnings tell of the machine's own pip settings, and none of them is for us to mend.
pip_install() {
    "$VENV_PYTHON" -m pip install --quiet --quiet --no-input --disable-pip-version-check --progress-bar=off "$@" ||
        die 'pip failed (is there a network?): .venv is not complete; the next run begins it anew'
}

build_venv() {
    local python lock
    python=$(python_of_the_machine)
    say "making .venv with $("$python" --version) (about a minute)"
    # The stamps first: what is left of a .venv whose removal was killed must not look whole.
    rm -rf .venv/stamp-* .venv && "$python" -m venv .venv || die "$PWD: cannot make .venv here"
    for lock in "${LOCKS[@]}"; do
        pip_install --require-hashes --no-build-isolation -r "$lock"
    done
    stamp packages
}

install_project() {
    pip_install --no-deps --no-build-isolation --editable .
    local conflicts
    conflicts=$("$VENV_PYTHON" -m pip check) ||
        die "$conflicts"$'\nthe lock files are older than pyproject.toml: run scripts/lib/lock.sh'
    stamp project
}

# ---- where a command runs ----

# Becomes the command, where it may make network namespaces: here, or in a user namespace of its own.
run_in_lab() {
    if unshare --net --mount true 2>/dev/null; then
        exec "$@"
    fi
    exec scripts/rootless "$@"
}
