-- The service's own code: the same for both builds of the library.
local ffi = require "ffi"
local util = require "jit.util"

ffi.cdef[[
int encrypt_seal(const char *json, size_t len, char *token);
uint64_t session_blocks(void);
uint64_t session_bytes(void);
const char *encrypt_version(void);
]]

local _M = {}
local lib
local token = ffi.new("char[17]")
local filler = ("the quick brown fox jumps over the lazy dog; "):rep(128)

-- Called in each worker, not in the master: the library is loaded where it is used.
function _M.load(path)
    lib = ffi.load(path)
end

-- Between 0.3 and 4 KB, by uid alone, so that a load's total can be computed.
local function document(uid)
    return string.format(
        '{"uid":%d,"token":"%08x%08x","scope":"read write","payload":"%s"}',
        uid, (uid * 2654435761) % 4294967296, uid, filler:sub(1, 230 + (uid * 7919) % 3700))
end

-- Pure Lua and ffi, so that the JIT compiles it: the library is then called from compiled code.
local function seal(json)
    if lib.encrypt_seal(json, #json, token) ~= 0 then
        return nil
    end
    return ffi.string(token)
end

function _M.session()
    local uid = tonumber(ngx.var.arg_uid)
    if not uid then
        return ngx.exit(400)
    end
    local sealed = seal(document(uid))
    if not sealed then
        return ngx.exit(500)
    end
    ngx.print(sealed, "\n")
end

-- Many sessions in one request, for a worker that has to grow.
function _M.batch()
    local uid, n = tonumber(ngx.var.arg_uid), tonumber(ngx.var.arg_n)
    if not uid or not n then
        return ngx.exit(400)
    end
    for i = uid, uid + n - 1 do
        if not seal(document(i)) then
            return ngx.exit(500)
        end
    end
    ngx.print(n, "\n")
end

local function traces()
    local n = 0
    while util.traceinfo(n + 1) do
        n = n + 1
    end
    return n
end

function _M.stats()
    ngx.print(string.format(
        '{"pid":%d,"version":"%s","blocks":%d,"bytes":%d,"traces":%d}\n',
        ngx.worker.pid(), ffi.string(lib.encrypt_version()),
        tonumber(lib.session_blocks()), tonumber(lib.session_bytes()), traces()))
end

-- A page of text, long enough for gzip.
function _M.text()
    for line = 1, 40 do
        ngx.say(line, ": ", filler:sub(1, 200 + line))
    end
end

return _M
