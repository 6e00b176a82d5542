# shellcheck shell=bash
# Where the programs are that the demonstration, the benchmark and the tests use.
# Sourced by the scripts; needs `repo`, the folder of the checkout.
#
# Programs that apt could not install without changing what is there are unpacked
# below cargo's target folder, with the libraries they need; see install-tools.sh.
# They come before those of the machine: only what the machine lacks is unpacked.

# shellcheck disable=SC2154  # set by who sources this
tools=${CARGO_TARGET_DIR:-$repo/target}/tools
case $tools in /*) ;; *) tools=$PWD/$tools ;; esac
# A package's files as the package has them, and what starts its programs.
tools_root=$tools/root
tools_bin=$tools/bin

# The PATH of the machine itself. The administrator's programs are not on
# everybody's.
machine_path=${PATH//"$tools_bin:"/}
case :$machine_path: in *:/usr/sbin:*) ;; *) machine_path+=:/usr/local/sbin:/usr/sbin:/sbin ;; esac
PATH=$tools_bin:$machine_path
export PATH

# The folders with libraries below tools_root, as LD_LIBRARY_PATH has them.
tools_libraries() {
    [ ! -d "$tools_root" ] ||
        find "$tools_root" -name '*.so*' \( -type f -o -type l \) -printf '%h\n' | sort -u | paste -s -d :
}

# The file of program $1: not what starts it, where it is a private one.
program_file() {
    local found folder
    found=$(command -v "$1") || return 1
    if [ "$(dirname "$found")" = "$tools_bin" ]; then
        for folder in usr/bin usr/sbin bin sbin; do
            [ ! -x "$tools_root/$folder/$1" ] || { echo "$tools_root/$folder/$1"; return; }
        done
        return 1
    fi
    echo "$found"
}

# What the dynamic linker says of the program file $1; fails for a static one.
linked_libraries() {
    case $1 in
        "$tools_root"/*) LD_LIBRARY_PATH=$(tools_libraries) ldd "$1" 2>/dev/null ;;
        *) ldd "$1" 2>/dev/null ;;
    esac
}
