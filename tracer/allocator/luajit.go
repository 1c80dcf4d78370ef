package allocator

// findLuaJIT looks for LuaJIT's own allocator, which is not exported.
func (s *scanner) findLuaJIT(map[uint64]*Found) {}
