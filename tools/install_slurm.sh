#!/usr/bin/env bash
# Installs SLURM and munge for tests/slurm, from Debian's or Ubuntu's packages, unless they are installed. Without root
# or apt-get, or if the packages cannot be installed, it says so and returns 0: the tests are then skipped with a reason.
set -uo pipefail
PATH=$PATH:/usr/sbin:/sbin
missing=
for program in sbatch slurmctld slurmd munged; do command -v $program > /dev/null || missing=$program; done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  echo "SLURM is not installed: that needs root and apt-get. tests/slurm will be skipped."
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
# No daemon may start at installation, because the tests start their own on loopback
policy=/usr/sbin/policy-rc.d
made=
if [ ! -e $policy ]; then
  printf '#!/bin/sh\nexit 101\n' > $policy && chmod +x $policy && made=yes
fi
apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge > /dev/null ||
  echo "SLURM could not be installed. tests/slurm will be skipped."
[ -z "$made" ] || rm -f $policy
