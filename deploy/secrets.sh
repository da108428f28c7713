#!/bin/sh
# Draws the keys and the password of compose.yaml, those that are not there yet: secrets.sh [FOLDER]
# FOLDER is KVLOOM_SECRETS, as in compose.yaml, or else secrets/ beside this file.
#
# Nobody but their owner gets into the folder. The files themselves can be read by all, as containers with another user see
# nothing else of it.
set -eu
folder=${1:-${KVLOOM_SECRETS:-$(dirname "$0")/secrets}}
umask 022
mkdir -p "$folder"
chmod 700 "$folder"
for name in api_key admin_key grafana_password; do
    [ -s "$folder/$name" ] || od -An -N24 -tx1 /dev/urandom | tr -d ' \n' >"$folder/$name"
done
if [ ! -e "$folder/tenants.yaml" ]; then
    cat >"$folder/tenants.yaml" <<'END'
# Who shares the server, beside who has a key of api_key: names, weights, quotas, keys. See the server's docs.
# tenants:
#   acme:
#     weight: 2
#     api_keys: [a-key-of-acme]
END
fi
echo "$folder: $(ls "$folder" | tr '\n' ' ')"
