#!/usr/bin/env bash
# Boots a guest under cloud-hypervisor with a disk served by vhost-user-ploop.
#
# usage: cloud-hypervisor.sh SOCKET KERNEL INITRAMFS
#
# SOCKET is the path that vhost-user-ploop was given as --socket-path. Memory is
# shared because the back-end reads and writes it itself. Ask for as many queues
# as the guest has processors.
set -euo pipefail

[ $# -eq 3 ] || { sed -n '2,/^$/s/^# \{0,1\}//p' "$0" >&2; exit 2; }

exec cloud-hypervisor \
    --cpus boot=2 \
    --memory size=512M,shared=on \
    --kernel "$2" --initramfs "$3" --cmdline "console=ttyS0" \
    --serial tty --console off \
    --disk "vhost_user=true,socket=$1,num_queues=2,queue_size=256"
