#!/usr/bin/env bash
# Installs Debian's chromium for tests/watch, unless it is installed. Without root or apt-get, or if the package cannot be
# installed, it says so and returns 0: the tests in a browser are then skipped with a reason.
set -uo pipefail
command -v chromium > /dev/null && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  echo "chromium is not installed: that needs root and apt-get. The browser tests of tests/watch will be skipped."
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium > /dev/null ||
  echo "chromium could not be installed. The browser tests of tests/watch will be skipped."
