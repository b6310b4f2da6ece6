package main

import (
	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/envs/recipes"
)

func init() { inside[envs.ConvertVerb] = recipes.Step }
