#!/usr/bin/env bash
# What tests/bench/repair.py measures playbooks/install.yml against: the same host made by hand, as a script. It runs as root
# on a fresh Debian 12, in the directory with the files that the roles wrote on another host (etc/, usr/) and the service's
# own tree (app/, requirements/). The installation is not for use: nothing of it is recorded, checked again, or taken back.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
address=$1

apt-get -q -y update
apt-get -q -y install --no-install-recommends \
  python3-venv bubblewrap ca-certificates curl libseccomp2 logrotate ufw iptables caddy

useradd --system --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin nox-api
useradd --system --user-group --no-create-home --home-dir /home/nox --shell /usr/sbin/nologin nox
install -d -o root -g nox -m 0750 /home/nox /home/nox/nox
install -d -o nox -g nox -m 0755 /home/nox/nox/sandbox

release=/opt/nox/releases/by-hand
install -d /opt/nox/archives $release
python3 -m venv $release/venv
$release/venv/bin/pip install --quiet --require-hashes --only-binary :all: --requirement requirements/app-py3.11.lock
cp -r app/nox_api app/nox_runner $release/venv/lib/python3.11/site-packages/
$release/venv/bin/python -m compileall -q $release/venv/lib/python3.11/site-packages/nox_{api,runner}
ln -s releases/by-hand /opt/nox/current
ln -s current/venv /opt/nox/.venv

install -d -o nox-api -g adm -m 2750 /var/log/nox-api
install -m 0644 etc/logrotate.d/nox-api /etc/logrotate.d/nox-api
logrotate --debug /etc/logrotate.d/nox-api 2> /dev/null

install -d /var/lib/nox
install -m 0640 /dev/null /etc/default/nox-api
sed "s/^NOX_API_TOKEN=.*/NOX_API_TOKEN=$(openssl rand -hex 32)/" etc/default/nox-api > /etc/default/nox-api
history=/var/lib/nox-api/history
install -d -o root -g nox-api -m 0750 /var/lib/nox-api $history
install -o root -g nox-api -m 0640 -t $history var/lib/nox-api/history/HEAD var/lib/nox-api/history/config
ln -s objects/info/shallow $history/shallow
install -d -o nox-api -g nox-api -m 0750 $history/{objects,refs} $history/objects/{info,pack,segments} $history/refs/heads
install -m 0644 -t /etc/systemd/system etc/systemd/system/nox-*
systemctl daemon-reload
systemctl enable --now nox-runner.socket nox-runner.service nox-api.service

ufw allow 22/tcp
ufw allow 80/tcp
ufw allow 443/tcp
ufw default deny incoming
ufw --force enable

install -d /etc/caddy/sites-enabled
install -m 0644 etc/caddy/sites-enabled/nox-api.caddy /etc/caddy/sites-enabled/nox-api.caddy
install -m 0644 etc/caddy/Caddyfile /etc/caddy/Caddyfile
caddy validate --adapter caddyfile --config /etc/caddy/Caddyfile
systemctl enable caddy
systemctl restart caddy

install -m 0755 -t /usr/local/bin usr/local/bin/nox-*
install -d /usr/local/share/nox/host_state /usr/local/share/nox/tests
install -m 0644 -t /usr/local/share/nox/host_state usr/local/share/nox/host_state/*.py
install -m 0755 -t /usr/local/share/nox/tests usr/local/share/nox/tests/*

root=/var/lib/caddy/.local/share/caddy/pki/authorities/local/root.crt
until [ -e $root ]; do sleep 0.2; done
NOX_URL=https://$address NOX_CA=$root bash /usr/local/share/nox/tests/smoke.sh
