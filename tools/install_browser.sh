#!/bin/sh
# Install Debian's Chromium and its driver as root, unless there are a browser and a driver. Fails
# without them.
set -eu

for browser in chromium chromium-browser google-chrome google-chrome-stable; do
  if command -v "$browser" >/dev/null && command -v chromedriver >/dev/null; then exit 0; fi
done
if [ "${FLASH_INTERNIMAGE_TEST_BROWSER:-}" = none ]; then exit 1; fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing Chromium for the test of the page: 120 MB"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -qq --no-install-recommends chromium chromium-driver >/dev/null && exit 0
fi
echo "the test of the page needs Chromium or Chrome, and chromedriver; without them it fails:" >&2
echo "sudo apt-get install chromium chromium-driver" >&2
exit 1
