package profile

func (p *printer) verdicts(s *Snapshot) {}
