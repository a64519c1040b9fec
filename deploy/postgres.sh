#!/bin/sh
# Two roles that are no superusers, so that the database holds tenants apart: one owns the tables,
# the gateway's owns nothing, so that it cannot lift that.
set -eu
psql --username postgres --set password="$STORE_PASSWORD" --set owner="$OWNER_PASSWORD" <<'SQL'
CREATE ROLE controlprefix_owner LOGIN PASSWORD :'owner' NOSUPERUSER NOBYPASSRLS;
CREATE ROLE controlprefix LOGIN PASSWORD :'password' NOSUPERUSER NOBYPASSRLS;
CREATE DATABASE controlprefix OWNER controlprefix_owner;
SQL
