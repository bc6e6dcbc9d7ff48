CREATE TABLE alembic_version ( version_num VARCHAR(32) NOT NULL, CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num) );
CREATE TABLE api_key ( id VARCHAR NOT NULL, name VARCHAR NOT NULL, digest VARCHAR NOT NULL, scopes JSON NOT NULL, created_at FLOAT NOT NULL, expires_at FLOAT, last_used_at FLOAT, PRIMARY KEY (id), UNIQUE (name) );
CREATE TABLE attempt ( id VARCHAR NOT NULL, model VARCHAR NOT NULL, state VARCHAR NOT NULL, placement JSON NOT NULL, claimed_at FLOAT NOT NULL, started_at FLOAT, ready_at FLOAT, ended_at FLOAT, exit_code INTEGER, oom BOOLEAN NOT NULL, reason VARCHAR, log_tail JSON, parameters JSON DEFAULT '{}' NOT NULL, PRIMARY KEY (id) );
CREATE TABLE download ( model VARCHAR NOT NULL, repo VARCHAR NOT NULL, "commit" VARCHAR NOT NULL, files JSON NOT NULL, path VARCHAR NOT NULL, operation VARCHAR NOT NULL, mmproj VARCHAR, alias VARCHAR, is_listed BOOLEAN NOT NULL, state VARCHAR NOT NULL, PRIMARY KEY (model) );
CREATE TABLE event ( id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, at FLOAT NOT NULL, kind VARCHAR NOT NULL, text VARCHAR NOT NULL, model VARCHAR, attempt VARCHAR, data JSON NOT NULL );
CREATE TABLE instance ( model VARCHAR NOT NULL, state VARCHAR NOT NULL, since_s FLOAT NOT NULL, failure JSON, failures INTEGER NOT NULL, retry_at_s FLOAT, load_time_s FLOAT NOT NULL, unloads JSON NOT NULL, unload_wanted BOOLEAN NOT NULL, force BOOLEAN NOT NULL, attempt VARCHAR, placement JSON NOT NULL, claimed_at_s FLOAT NOT NULL, started_at_s FLOAT NOT NULL, ready_at_s FLOAT, host VARCHAR, port INTEGER, drained_for VARCHAR, stop_reason VARCHAR, is_failing BOOLEAN NOT NULL, assumed_bytes JSON NOT NULL, gone_at_s FLOAT, held_bytes JSON NOT NULL, unexplained_before JSON NOT NULL, reclaim_measured_s FLOAT NOT NULL, parameters JSON DEFAULT '{}' NOT NULL, PRIMARY KEY (model) );
CREATE INDEX ix_attempt_model ON attempt (model);
CREATE INDEX ix_event_model ON event (model);
CREATE TABLE learned ( "key" VARCHAR NOT NULL, recipe JSON NOT NULL, card VARCHAR NOT NULL, predicted_bytes INTEGER NOT NULL, loads JSON NOT NULL, floor_bytes INTEGER NOT NULL, PRIMARY KEY ("key") );
CREATE TABLE meta ( "key" VARCHAR NOT NULL, value VARCHAR NOT NULL, PRIMARY KEY ("key") );
CREATE TABLE model_state ( model VARCHAR NOT NULL, pinned BOOLEAN, hold_until FLOAT, PRIMARY KEY (model) );
CREATE TABLE operation ( id VARCHAR NOT NULL, kind VARCHAR NOT NULL, model VARCHAR NOT NULL, created_at FLOAT NOT NULL, state VARCHAR NOT NULL, message VARCHAR NOT NULL, code VARCHAR, freed_bytes INTEGER NOT NULL, ended_at FLOAT, PRIMARY KEY (id) );
CREATE TABLE session ( digest VARCHAR NOT NULL, key_id VARCHAR NOT NULL, expires_at FLOAT NOT NULL, PRIMARY KEY (digest) );
INSERT INTO alembic_version VALUES ('0006');
INSERT INTO meta VALUES ('owner', 'owner-then'), ('boot', 'boot-then'), ('engine', 'process'), ('devices', 'host');
INSERT INTO model_state VALUES ('alpha', 1, NULL), ('beta', NULL, 1800000600.0);
INSERT INTO instance (model, state, since_s, failures, load_time_s, unloads, unload_wanted, force, attempt,
    placement, claimed_at_s, started_at_s, ready_at_s, host, port, is_failing, assumed_bytes, held_bytes,
    unexplained_before, reclaim_measured_s)
VALUES ('alpha', 'ready', 50.0, 0, 2.5, '[]', 0, 0, 'a1', '{"GPU-1":64}', 40.0, 41.0, 50.0, '127.0.0.1', 8001,
    0, '{}', '{}', '{}', 0.0);
INSERT INTO attempt (id, model, state, placement, claimed_at, started_at, ready_at, oom)
VALUES ('a1', 'alpha', 'ready', '{"GPU-1":64}', 1800000000.0, 1800000001.0, 1800000002.0, 0);
INSERT INTO operation (id, kind, model, created_at, state, message, freed_bytes)
VALUES ('op-running', 'load', 'beta', 1800000000.0, 'running', '', 0);
INSERT INTO event (at, kind, text, model, attempt, data)
VALUES (1800000002.0, 'ready', '''alpha'' is ready after 2.50 s', 'alpha', 'a1', '{"seconds":2.5}');
INSERT INTO download (model, repo, "commit", files, path, operation, mmproj, alias, is_listed, state)
VALUES ('acme/tiny-GGUF:Q8_0', 'acme/tiny-GGUF', 'c0ffee', '[{"path":"tiny-Q8_0.gguf","size_bytes":480,"blob":"b10b"}]',
    'tiny-Q8_0.gguf', 'op-running', NULL, 'acme/tiny-GGUF', 0, 'running');
INSERT INTO api_key VALUES ('3f9a1c07', 'webui', 'aa00', '["inference","lease"]', 1800000000.0, 1900000000.0, NULL);
INSERT INTO session VALUES ('bb00', '3f9a1c07', 1800604800.0);
INSERT INTO learned VALUES ('33c8f0', '{"content":"480-b10b","service":"5e41","context_size":8192,"n_gpu_layers":999,"parallel":4,
    "cache_type_k":"f16","cache_type_v":"f16","gpus":1}', 'NVIDIA H100 80GB HBM3, driver 580.159.04', 6044000000,
    '[{"attempt":"a1","ready_bytes":6025000000,"peak_bytes":6038000000,"at":1800000003.0,
    "buffers":{"CUDA0":{"model":4671737856,"KV":603979776}}}]', 0);
