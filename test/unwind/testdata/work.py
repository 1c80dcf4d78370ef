# Allocates for ever in three ways: JSON, SQLite and TLS contexts.
import json
import sqlite3
import ssl

db = sqlite3.connect(":memory:")
db.execute("create table t (a int, b text)")
doc = {"names": ["n%d" % i for i in range(50)], "nested": {"a": [1.5, None, True] * 20}}
print("ready", flush=True)
while True:
    text = json.dumps(doc, indent=1)
    json.loads(text)
    db.execute("insert into t values (?, ?)", (1, text * 3))
    db.execute("select count(*), group_concat(b) from t where a = 1").fetchall()
    db.execute("delete from t")
    ssl.create_default_context()
