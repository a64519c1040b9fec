#!/bin/sh
# The gateway's own role, which is no superuser, so that the database holds tenants apart.
set -eu
psql --username postgres --set password="$STORE_PASSWORD" <<'SQL'
CREATE ROLE controlprefix LOGIN PASSWORD :'password' NOSUPERUSER NOBYPASSRLS;
CREATE DATABASE controlprefix OWNER controlprefix;
SQL
